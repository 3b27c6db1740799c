"""Pieces of a run's work that a process of its own does, so that it can die in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from opd_daemon import failpoints
from opd_daemon.distill.checkpoints import OPTIMIZER, Checkpoints, RunProgress
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.files import write_file
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.home import Home
from opd_daemon.store import Store
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.payload import Entry
from opd_daemon.types import Event, EventKind, StepMetrics

EMPTY_TENSORS = b"\x08\0\0\0\0\0\0\0{}      "
ADDRESS = "ab" * 32


def with_points(points: str, job: Callable[[Path], None], root: Path) -> None:
    """The body of a process that is to die at a point of its job."""
    failpoints.arm({"OPD_FAILPOINTS": points, "OPD_TEST_HARNESS": "1"})
    job(root)


def save(folder: Path) -> None:
    for name in ("adapters.safetensors", OPTIMIZER):
        write_file(folder / name, EMPTY_TENSORS)
    write_file(folder / "adapter_config.json", b"{}")


def save_twice(root: Path) -> None:
    """The same checkpoint, and again in place of the first."""
    checkpoints = Checkpoints(root, keep_last=1)
    for _ in range(2):
        checkpoints.save_step(RunProgress(step=1), save)


def save_two_and_keep_one(root: Path) -> None:
    """Two checkpoints, the first of which is deleted for the second."""
    checkpoints = Checkpoints(root, keep_last=1)
    for step in (1, 2):
        checkpoints.save_step(RunProgress(step=step), save)


def open_checkpoints(root: Path) -> None:
    Checkpoints(root, keep_last=1)


def fill_store(root: Path) -> None:
    store = Store(root / "opd.db")
    for number in range(50):
        event = Event(EventKind.LOG, "r", {"level": "info", "text": str(number)}, datetime.now(UTC))
        store.apply(None, [event])
    store.close()


def compact(root: Path) -> None:
    Store(root / "opd.db").compact(40)


class Silent:
    """A reporter nobody listens to."""

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None: ...

    def gauges(self, values: dict[str, float]) -> None: ...

    def settle(self) -> None: ...

    def started(self) -> None: ...


def journal(root: Path) -> Journal:
    return Journal(Silent(), Home(root).run("run"), lambda ids: "".join(map(chr, ids)))


def journal_two_steps(root: Path) -> None:
    """A run that starts anew writes its first steps."""
    written = journal(root)
    written.forget_after(0)
    for step in (1, 2):
        numbers = dict.fromkeys(StepMetrics.__dataclass_fields__, 0)
        written.metrics(StepMetrics(**{**numbers, "step": step}))  # type: ignore[arg-type]


def steps_in_log(root: Path) -> list[int]:
    path = Home(root).run("run").train_metrics
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def two_rollouts(root: Path) -> None:
    written = journal(root)
    written.forget_after(0)
    made = [Rollout(Prompt(number, "why?", (1, 2)), (65, 66), "stop", "student") for number in range(2)]
    written.rollouts(1, made, sample=False)


def rollouts_in_log(root: Path) -> list[str]:
    return Home(root).run("run").rollouts.read_text().splitlines()


def report(root: Path) -> None:
    """A report without charts, which take seconds to draw."""
    from opd_daemon.distill.report import page
    from tests.distill.written_run import run_of, write_run

    page.sections = lambda _: []
    page.render = lambda *_: "<html></html>"
    run = run_of(4)
    page.write_report(run, write_run(Home(root), run))


def keep_answer(root: Path) -> None:
    """The teacher's cache opens and keeps one answer."""
    cache = TeacherCache(root, 1 << 20)
    cache.open()
    cache.write(ADDRESS, Entry({"logprobs": np.zeros(4, np.float32)}, 1.0, {}))
    cache.close()


def answers_kept(root: Path) -> int:
    """Answers a cache finds when it opens."""
    cache = TeacherCache(root, 1 << 20)
    cache.open()
    found = cache.read(ADDRESS, lambda entry: entry)
    cache.close()
    return 0 if found is None else 1
