"""What the demo found, in numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_daemon.distill.report.answers import Answers
from opd_daemon.types import CacheStats, Event, EventKind, Run

METRICS = ("forward_kl", "reverse_kl", "agreement", "top5_agreement", "teacher_entropy", "student_entropy")


class Seconds:
    """Time by phase, in the order in which phases began."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._began = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add to a phase."""
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    def add_run(self, events: list[Event]) -> None:
        """The phases of a run, from its own measurements: start of the worker, evaluations, and the parts of steps."""
        states = {event.payload["state"]: event.time for event in events if event.kind is EventKind.RUN_STATE}
        if "RUNNING" in states:
            self.add("start of the worker", (states["RUNNING"] - events[0].time).total_seconds())
        for event in events:
            if event.kind is EventKind.EVALUATION:
                name = "baseline evaluation" if event.payload["step"] == 0 else "evaluation"
                self.add(name, event.payload["seconds"])
            elif event.kind is EventKind.METRICS:
                self.add("rollout", event.payload["rollout_milliseconds"] / 1000)
                self.add("score", event.payload["teacher_milliseconds"] / 1000)
                self.add("train", event.payload["student_milliseconds"] / 1000)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Metrics on the held-out prompts before and after, and everything that is shown beside them."""

    trainer: str
    run: Run
    before: dict[str, Any]
    after: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: list[Answers]
    seconds: Seconds
    cache: CacheStats
    curve_path: str = ""

    @property
    def adapter_path(self) -> str:
        """Folder of the final adapter."""
        return self.run.adapter_path

    @property
    def command(self) -> str:
        """How plain mlx-lm uses the adapter."""
        return (
            f"mlx_lm.generate --model {self.run.config['base_model_path']} --adapter-path {self.adapter_path} "
            "--prompt 'Why is the sky blue?'"
        )

    def to_json(self) -> dict[str, Any]:
        """Fractions and nats on the held-out prompts, seconds by phase, cache, paths."""
        return {
            "trainer": self.trainer,
            "run_id": self.run.run_id,
            "before": {name: self.before[name] for name in METRICS},
            "after": {name: self.after[name] for name in METRICS},
            "exact": bool(self.after["exact"]),
            "held_out": {"prompts": self.after["samples"], "tokens": self.after["tokens"]},
            "seconds": {name: round(value, 3) for name, value in self.seconds.phases.items()},
            "cache": asdict(self.cache),
            "adapter_path": self.adapter_path,
            "command": self.command,
            "curve": self.curve_path,
            "report": self.run.report_path,
            "answers": [asdict(entry) for entry in self.answers],
        }

    def write_json(self, file: Path) -> None:
        """Write `to_json` to a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
