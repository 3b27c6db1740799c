"""The files of runs: names that are taken, configurations on their way to one, and what is left to be removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from opd_daemon.distill.files import write_file
from opd_daemon.failpoints import hit
from opd_daemon.home import Home

# The configuration of a run that is about to be stored.
ACCEPTING = ".accepting"
# Folders of files that `write_file` may have left under a temporary name; checkpoints tidy up after themselves.
TIDIED = ("configs", "metrics", "student_rollouts", "reports")
UNFINISHED = re.compile(r"\..+\.(\d+|old)")


def names_on_disk(home: Home) -> set[str]:
    """Names whose files are there although the store may not know them: they must not be overwritten."""
    names = {entry.stem for entry in (home.root / "configs").glob("*.yaml")}
    return names | {entry.name for entry in (home.root / "checkpoints").glob("*")}


def is_folder(path: str) -> bool:
    """Whether a folder is there; false too for what no disk takes for a path."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


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
