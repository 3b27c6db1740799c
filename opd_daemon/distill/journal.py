"""Everything a run tells: durable events to the reporter, the same rows in JSONL files, and fleeting gauges."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from opd_daemon.distill.checkpoints import folder_bytes
from opd_daemon.distill.files import append_line, sync_file
from opd_daemon.distill.rollouts import Rollout, RolloutLog, forget_after
from opd_daemon.distill.token_table import TokenTable, read_token_tables, write_token_tables
from opd_daemon.failpoints import hit
from opd_daemon.home import RunFolders
from opd_daemon.trainer import Reporter
from opd_daemon.types import EvaluationMetrics, EventKind, StepMetrics

GAUGE_SECONDS = 2.0
SAMPLE_CHARACTERS = 2000


class Journal:
    """Writes the run down. `decode` turns completion ids into text."""

    def __init__(self, reporter: Reporter, folders: RunFolders, decode: Callable[[list[int]], str]) -> None:
        self.reporter = reporter
        self.folders = folders
        self.decode = decode
        self.rollout_log = RolloutLog(folders.rollouts, decode)
        self._gauged = 0.0
        self._pace: dict[str, float] = {}

    def forget_after(self, step: int) -> None:
        """Drop the rows of later steps from the files, which a resumed run is going to write again."""
        for path in self._logs:
            forget_after(path, step)
        tables = read_token_tables(self.folders.token_tables)
        if any(table.step > step for table in tables):
            write_token_tables(self.folders.token_tables, [table for table in tables if table.step <= step])

    def settle(self) -> None:
        """Return once all that was told is stored for good: a checkpoint vouches for what came before it."""
        for path in self._logs:
            sync_file(path)
        self.reporter.settle()

    def metrics(self, metrics: StepMetrics) -> None:
        """Report a step."""
        self._pace = {
            "tokens_per_second": metrics.tokens_per_second,
            "seconds_remaining": metrics.seconds_remaining,
        }
        self._write(self.folders.train_metrics, EventKind.METRICS, asdict(metrics))

    def evaluation(self, metrics: EvaluationMetrics, table: TokenTable | None = None) -> None:
        """Report an evaluation; the token table goes beside that of the first one."""
        if table is not None:
            first = [known for known in read_token_tables(self.folders.token_tables) if known.step < table.step][:1]
            write_token_tables(self.folders.token_tables, [*first, table])
        self._write(self.folders.eval_metrics, EventKind.EVALUATION, asdict(metrics))

    def checkpoint(
        self,
        step: int,
        path: Path,
        *,
        is_best: bool = False,
        is_final: bool = False,
        validation_kl: float | None = None,
    ) -> None:
        """Report a checkpoint that is on disk."""
        payload = {
            "step": step,
            "path": str(path),
            "bytes": folder_bytes(path),
            "is_best": is_best,
            "is_final": is_final,
            "validation_kl": validation_kl,
        }
        self.reporter.event(EventKind.CHECKPOINT, payload)

    def log(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Say something in words."""
        self.reporter.event(EventKind.LOG, {"level": level, "text": text})

    def rollouts(self, step: int, rollouts: Sequence[Rollout], *, sample: bool) -> None:
        """Keep the rollouts of a step; with `sample`, show the first one to those who watch."""
        self.rollout_log.append(step, rollouts)
        if sample and rollouts:
            self.sample(step, rollouts[0])

    def sample(self, step: int, rollout: Rollout) -> None:
        """Show a completion to those who watch."""
        payload = {
            "step": step,
            "prompt": rollout.prompt.text[:SAMPLE_CHARACTERS],
            "completion": self.decode(list(rollout.completion_ids))[:SAMPLE_CHARACTERS],
            "source": "student" if rollout.source == "student" else "teacher",
        }
        self._write(self.folders.samples, EventKind.SAMPLE, payload)

    def gauges(self, values: dict[str, float]) -> None:
        """Report readings, at most every two seconds, with the pace of the last step."""
        if time.monotonic() - self._gauged >= GAUGE_SECONDS:
            self._gauged = time.monotonic()
            self.reporter.gauges({**self._pace, **values})

    @property
    def _logs(self) -> tuple[Path, ...]:
        folders = self.folders
        return (folders.train_metrics, folders.eval_metrics, folders.rollouts, folders.samples)

    def _write(self, path: Path, kind: EventKind, payload: dict[str, Any]) -> None:
        line = json.dumps(payload)
        append_line(path, line)
        hit("journal.append")
        self.reporter.event(kind, json.loads(line))  # the same plain values in both places
