"""`opd doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opd_daemon.doctor import Finding

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


def doctor(as_json: bool = typer.Option(False, "--json", help="As JSON.")) -> int:
    """Look for what is wrong with the installation, the machine and the daemon's folder. Exit code 1 on errors."""
    from opd_daemon.doctor import Level, examine
    from opd_daemon.home import Home

    findings = examine(Home.default())
    if as_json:
        found = list(findings)
        output.show_json(found)
    else:
        found = _show(findings)
    return exits.FAILED if any(finding.level is Level.ERROR for finding in found) else exits.OK


def _show(findings: Iterable[Finding]) -> list[Finding]:
    """Each finding as soon as it is there, its cure below it; all of them at the end."""
    from rich.table import Table
    from rich.text import Text

    screen = output.console()
    found = []
    for finding in findings:
        mark, colour = MARKS[finding.level]
        line = Table.grid(padding=(0, 1))
        for width in (1, 10):
            line.add_column(width=width)
        line.add_column(overflow="fold")
        line.add_row(Text(mark, style=colour), finding.subject, Text(finding.text))
        if finding.cure:
            line.add_row("", "", Text(f"→ {finding.cure}", style=colour))
        screen.print(line)
        found.append(finding)
    levels = [str(finding.level) for finding in found]
    counts = [(levels.count(level), level) for level in ("error", "warning")]
    output.show("\n" + ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for count, level in counts))
    return found
