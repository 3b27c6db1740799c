"""Timing the steps of a run in this process, with something else measured between them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_daemon.config import parse_config
from opd_daemon.demo.story import prompts_file
from opd_daemon.distill import Step
from opd_daemon.distill.session import run_trainer
from opd_daemon.home import Home
from opd_daemon.trainer import Teacher, TrainContext, Trainer, TrainerInfo
from opd_daemon.types import EventKind


class TimedLoop:
    """A run's loop that tells the seconds of every step, all that the loop does around it included, but the last's.

    before: called with each step, outside the time. between: called after each step, outside the time.
    """

    def __init__(self, loop: Any, before: Callable[[Step], None], between: Callable[[Step, float], None]) -> None:
        self._loop = loop
        self._before = before
        self._between = between

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __iter__(self) -> Iterator[Step]:
        steps = iter(self._loop)
        step = next(steps, None)
        while step is not None:
            self._before(step)
            started = time.perf_counter()
            yield step
            # What follows the step: its metrics, its checkpoint, the prompts of the next one.
            following = next(steps, None)
            if following is not None:
                self._between(step, time.perf_counter() - started)
            step = following


class Timed:
    """A trainer whose steps are timed."""

    def __init__(
        self,
        trainer: Trainer,
        before: Callable[[TrainContext, Step], None],
        between: Callable[[TrainContext, Step, float], None],
    ) -> None:
        self._trainer = trainer
        self._before = before
        self._between = between

    def train(self, context: TrainContext) -> None:
        """As the trainer."""
        loop: Any = TimedLoop(
            context.loop,
            lambda step: self._before(context, step),
            lambda step, seconds: self._between(context, step, seconds),
        )
        self._trainer.train(replace(context, loop=loop))


class Quiet:
    """A reporter nobody listens to."""

    def started(self) -> None:
        """Nothing."""

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        """Nothing."""

    def gauges(self, values: dict[str, float]) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing."""


def run_timed(folder: Path, values: dict[str, Any], info: TrainerInfo, timed: Timed, teacher: Teacher) -> None:
    """Do a run in this process."""
    run_trainer(
        run_id="bench",
        config=parse_config(values),
        trainer=replace(info, factory=lambda: timed),
        folders=Home(folder / "run_home").run("bench"),
        teacher=teacher,
        reporter=Quiet(),
        should_stop=lambda: False,
        resume_from=None,
    )


def write_prompts(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` of the demo's training prompts, and one to hold out."""
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, name, rows in ((paths[0], "train.jsonl", count), (paths[1], "held_out.jsonl", 1)):
        lines = prompts_file(name).read_text(encoding="utf-8").splitlines()[:rows]
        path.write_text("".join(json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n" for line in lines))
    return paths
