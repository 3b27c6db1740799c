"""What all runs together may keep on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.readable import size
from opd_daemon.types import TEACHER_CACHE, Plan, Run

# Unless the daemon's owner says otherwise.
MOST_BYTES = 100 * 10**9
FOLDERS = ("configs", "metrics", "student_rollouts", "reports", "checkpoints")


def require_room(home: Home, plan: Plan | None, unfinished: Sequence[Run], most_bytes: int) -> None:
    """Refuse a run when all of them might come to keep more than that; blocks.

    unfinished: runs that wait or go on, which will still need what they were planned to.

    Raises:
        OpdError: DISK_FULL.
    """
    so_far = [sum(_bytes_of(path) for path in _places(home, run)) for run in unfinished]
    kept = sum(_bytes_of(home.root / folder) for folder in FOLDERS)
    coming = sum(max(0, planned_bytes(run.plan) - kept_now) for run, kept_now in zip(unfinished, so_far, strict=True))
    needed = planned_bytes(plan)
    if kept + coming + needed > most_bytes:
        others = f", those that are not finished will add {size(coming)}" if coming else ""
        message = (
            f"runs keep {size(kept)} on disk{others} and this one needs {size(needed)}, together more than "
            f"{size(most_bytes)}; delete some with 'opd delete', or allow more with 'opd serve --runs-limit'"
        )
        raise OpdError(Reason.DISK_FULL, message, limit_bytes=most_bytes, kept_bytes=kept, needed_bytes=needed)


def planned_bytes(plan: Plan | None) -> int:
    """What a run of this plan is going to keep."""
    return sum(part.bytes for part in plan.disk if part.name != TEACHER_CACHE) if plan else 0


def _places(home: Home, run: Run) -> list[Path]:
    places = home.run(run.run_id)
    return [getattr(places, field.name) for field in fields(places) if field.name != "worker_log"]


def _bytes_of(place: Path) -> int:
    """Size of a file, or of everything in a folder; a run that is going on may tidy up meanwhile."""
    inside = (Path(parent) / name for parent, _, names in os.walk(place) for name in names)
    return sum(map(_size, [place] if place.is_file() else inside))


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        return 0
