"""TensorBoard event files of every run, in `$OPD_HOME/tensorboard/<run_id>`: `tensorboard --logdir ~/.opd/tensorboard`.

`train/…` has the metrics of each step, `eval/…` those of each evaluation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opd_daemon import hookimpl
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind, Run

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FLUSH_SECONDS = 5
SECTIONS = {EventKind.METRICS: "train", EventKind.EVALUATION: "eval"}
NOT_PLOTTED = frozenset({"step", "total_steps"})

_writers: dict[str, SummaryWriter] = {}


@hookimpl
def opd_event(event: Event) -> None:
    """Write the numbers of one step."""
    if event.kind not in SECTIONS:
        return
    step = event.payload["step"]
    writer = _writer(event.run_id, step)
    for name, value in event.payload.items():
        if name not in NOT_PLOTTED and _is_plottable(value):
            writer.add_scalar(f"{SECTIONS[event.kind]}/{name}", value, step, event.time.timestamp())


@hookimpl
def opd_after_run_finished(run: Run) -> None:
    """Close the run's file."""
    if run.run_id in _writers:
        _writers.pop(run.run_id).close()


@hookimpl
def opd_daemon_stopping() -> None:
    """Close every file that is still open."""
    while _writers:
        _writers.popitem()[1].close()


def _writer(run_id: str, step: int) -> SummaryWriter:
    if run_id not in _writers:
        from tensorboardX import SummaryWriter

        folder = Home.default().root / "tensorboard" / run_id
        # A resumed run makes its last steps again: what the earlier file says about them no longer counts.
        purge = {"purge_step": step} if folder.exists() else {}
        _writers[run_id] = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS, **purge)
    return _writers[run_id]


def _is_plottable(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
