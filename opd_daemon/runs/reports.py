"""Reports of runs at rest: written by their workers, or here when one is asked for that no worker has written."""

from __future__ import annotations

import threading
from typing import BinaryIO

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.runs.downloads import open_files
from opd_daemon.types import Run, RunState

# Two writers of one report would use the same temporary names.
_WRITING = threading.Lock()


def report_path(home: Home, run: Run) -> str:
    """Where the report of a run at rest is; empty when there is none yet."""
    path = home.run(run.run_id).report
    return str(path) if run.state.resting and path.is_file() else ""


def open_report(home: Home, run: Run) -> list[BinaryIO]:
    """The report's page, then its pictures. A run that ended early gets one of what it did until then. Blocks.

    Raises:
        OpdError: REPORT_NOT_FOUND for a run that hasn't finished, ended before it measured anything, or is being
            deleted; DISK_FULL.
    """
    if not run.state.resting:
        message = f"run {run.run_id!r} is {run.state}; its report is written when it has finished"
        raise OpdError(Reason.REPORT_NOT_FOUND, message, run_id=run.run_id, state=run.state)
    folders = home.run(run.run_id)
    with _WRITING:
        # That of a run which ended early may be from before it was taken up again.
        if run.state is not RunState.SUCCEEDED or not folders.report.is_file():
            from opd_daemon.distill.report import write_report  # imports matplotlib

            write_report(run, folders)
        # Opened before anybody may write it anew.
        try:
            return open_files([folders.report, *sorted(folders.pictures.glob("*.png"))])
        except FileNotFoundError:
            message = f"the report of run {run.run_id!r} has been deleted; ask again, and it is written if it can be"
            raise OpdError(Reason.REPORT_NOT_FOUND, message, run_id=run.run_id) from None
