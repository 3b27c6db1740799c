"""What a run wrote down, read back: every number of a report comes from here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon.distill.token_table import TokenTable, read_token_tables
from opd_daemon.home import RunFolders
from opd_daemon.types import Run

Row = dict[str, Any]

# Parts of the plan that are no arrays in use, which alone MLX's peak counts.
NO_ARRAYS = frozenset({"process", "tokenizer", "buffers kept"})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run, its steps and evaluations in order, its samples, and its token tables of the first and last evaluation."""

    run: Run
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    samples: tuple[Row, ...] = ()
    tables: tuple[TokenTable, ...] = ()
    checkpoint_bytes: int = 0

    @classmethod
    def read(cls, run: Run, folders: RunFolders) -> RunRecord:
        """Read a run's files; what is missing, cut off or no number is left out."""
        return cls(
            run,
            by_step(read_rows(folders.train_metrics)),
            by_step(read_rows(folders.eval_metrics)),
            tuple(read_rows(folders.samples)),
            _tables(folders.token_tables),
            sum(file.stat().st_size for file in folders.checkpoints.rglob("*") if file.is_file()),
        )

    @property
    def empty(self) -> bool:
        """Whether the run ended before it measured anything."""
        return not self.steps and not self.evaluations

    @property
    def planned_array_bytes(self) -> int | None:
        """The planned peak of the worker's arrays, to compare with MLX's own; None without a plan that knows it."""
        plan = self.run.plan
        if plan is None:
            return None
        rest = sum(part.bytes for part in plan.memory if part.process == "worker" and part.name in NO_ARRAYS)
        return max(0, plan.worker_peak_bytes - rest) or None  # with precompute the peak may be the teacher's alone

    @property
    def last_step(self) -> int:
        """Steps that were done."""
        return max((row["step"] for row in (*self.steps, *self.evaluations)), default=0)

    @property
    def before(self) -> Row | None:
        """The first evaluation, if there is a later one to compare it with."""
        return self.evaluations[0] if len(self.evaluations) > 1 else None

    @property
    def after(self) -> Row | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None


def read_rows(path: Path) -> list[Row]:
    """Objects of a JSONL file; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def by_step(rows: Iterable[Row]) -> tuple[Row, ...]:
    """One row a step, the last one written, in order of steps."""
    found = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return tuple(found[step] for step in sorted(found))


def number(row: Row | None, name: str) -> float | None:
    """A finite number of a row; None when it is missing or none."""
    value = row.get(name) if row else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it is a number."""
    found = [(float(row["step"]), value) for row in rows if (value := number(row, name)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def total(rows: Sequence[Row], name: str) -> float:
    """Sum of a metric over all steps."""
    return sum(series(rows, name)[1])


def _tables(path: Path) -> tuple[TokenTable, ...]:
    try:
        tables = read_token_tables(path)
    except (ValueError, KeyError, TypeError):  # of another version
        return ()
    return (tables[0], tables[-1]) if len(tables) > 1 else tuple(tables)
