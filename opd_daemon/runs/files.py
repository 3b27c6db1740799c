"""The files of runs: names that are taken, configurations on their way to one, and what is left to be removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from opd_daemon.distill.files import write_file
from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit
from opd_daemon.home import Home
from opd_daemon.readable import size
from opd_daemon.types import TEACHER_CACHE, Plan

# What all runs together may keep, unless the daemon's owner says otherwise.
MOST_BYTES = 100 * 10**9
# The configuration of a run that is about to be stored.
ACCEPTING = ".accepting"
# Folders of files that `write_file` may have left under a temporary name; checkpoints tidy up after themselves.
TIDIED = ("configs", "metrics", "student_rollouts", "reports")
KEPT = (*TIDIED, "checkpoints")
UNFINISHED = re.compile(r"\..+\.(\d+|old)")


def names_on_disk(home: Home) -> set[str]:
    """Names whose files are there although the store may not know them: they must not be overwritten."""
    names = {entry.stem for entry in (home.root / "configs").glob("*.yaml")}
    return names | {entry.name for entry in (home.root / "checkpoints").glob("*")}


def require_room(home: Home, plan: Plan | None, most_bytes: int) -> None:
    """All runs together may keep so much, however much room the disk has. Raises DISK_FULL; blocks."""
    kept = sum(_bytes_in(home.root / folder) for folder in KEPT)
    needed = sum(part.bytes for part in plan.disk if part.name != TEACHER_CACHE) if plan else 0
    if kept + needed > most_bytes:
        message = (
            f"runs keep {size(kept)} on disk and this one needs {size(needed)}, together more than {size(most_bytes)}; "
            "delete some with 'opd delete', or allow more with 'opd serve --runs-limit'"
        )
        raise OpdError(Reason.DISK_FULL, message, limit_bytes=most_bytes, kept_bytes=kept, needed_bytes=needed)


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run that is going on tidies up
                total += (Path(parent) / name).lstat().st_size
    return total


def write_waiting(config: Path, text: str) -> Path:
    """Write a configuration beside its place; returns where. Raises DISK_FULL and INVALID_REQUEST as `write_file`.

    It gets its name when the run is stored, so that a crash in between leaves no name taken by nobody.
    """
    waiting = config.with_suffix(ACCEPTING)
    write_file(waiting, text.encode())
    return waiting


def tidy_up(home: Home, known: Collection[str]) -> None:
    """Finish or undo what a daemon was writing when it ended. known: names of the runs that were stored."""
    for waiting in (home.root / "configs").glob(f"*{ACCEPTING}"):
        if waiting.stem in known:
            waiting.replace(waiting.with_suffix(".yaml"))
        else:
            waiting.unlink(missing_ok=True)
    for folder in TIDIED:
        for entry in (home.root / folder).glob(".*"):
            if UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def remove_files(home: Home, run_id: str) -> None:
    """Remove everything a run has written. Its configuration last: while it is there, nobody else gets the name."""
    folders = home.run(run_id)
    for folder in (folders.checkpoints, folders.pictures):
        shutil.rmtree(folder, ignore_errors=True)
        hit("run.delete.files")
    metrics = (folders.train_metrics, folders.eval_metrics, folders.token_tables, folders.samples)
    for path in (folders.rollouts, *metrics, folders.report, folders.worker_log, folders.config):
        path.unlink(missing_ok=True)
