"""Where the command line writes: results to stdout, everything else to stderr; tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_daemon.errors import OpdError

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr, without colour where nobody can see it."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def say(text: str) -> None:
    """One line for the person at the terminal; never part of the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(text: str = "") -> None:
    """One line of the result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_error(error: OpdError) -> None:
    """One line per fault."""
    if error.violations:
        for violation in error.violations:
            say(f"opd: {violation.field.removeprefix('config.')}: {violation.description}")
    else:
        say(f"opd: {error.message}")


def show_json(value: object) -> None:
    """One JSON document on stdout."""
    show(json.dumps(plain(value), indent=2, ensure_ascii=False))


def show_json_line(value: object) -> None:
    """One line of JSON on stdout."""
    show(json.dumps(plain(value), ensure_ascii=False))


def plain(value: object) -> Any:
    """Domain types as JSON data: dataclasses by field, times in ISO 8601, numbers that JSON lacks as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (datetime, Path)):
        return value.isoformat() if isinstance(value, datetime) else str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """A table on stdout; the columns in `numbers` are aligned to the right. Piped output keeps its full width."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    screen = console()
    if not screen.is_terminal:
        screen.width = max(screen.width, 200)
    screen.print(table)


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Aligned `name  value` lines on stdout; empty values are left out."""
    rows = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        show(f"{name:<{width}}  {value}")


def is_terminal() -> bool:
    """Whether a person watches stdout."""
    return sys.stdout.isatty()


def can_ask() -> bool:
    """Whether a person can answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
