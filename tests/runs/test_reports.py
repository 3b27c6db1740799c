"""Who writes a run's report, and when there is none."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.runs.reports import open_report, report_path
from opd_daemon.runs.worker_main import write_report_of
from opd_daemon.types import Run, RunState
from tests.distill.written_run import run_of, write_run


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def contents(home: Home, run: Run) -> list[tuple[Path, bytes]]:
    with ExitStack() as opened:
        files = [opened.enter_context(file) for file in open_report(home, run)]
        return [(Path(file.name), file.read()) for file in files]


def test_a_worker_writes_the_report_of_a_run_that_is_not_yet_called_done(home: Home) -> None:
    run = replace(run_of(3, state=RunState.RUNNING), finished_at=None)
    folders = write_run(home, run)
    write_report_of(run, folders)
    text = folders.report.read_text()
    assert "RUNNING" not in text
    assert report_path(home, run) == ""
    assert report_path(home, run_of(3)) == str(folders.report)


def test_a_report_that_can_not_be_written_is_a_line_in_the_log(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(3)
    folders = write_run(home, run)
    (home.root / "reports").write_text("in the way")
    with caplog.at_level(logging.ERROR):
        write_report_of(run, folders)
    assert "'opd report fixture' tries again" in caplog.text


def test_a_run_that_goes_on_has_none(home: Home) -> None:
    run = run_of(3, state=RunState.RUNNING)
    write_run(home, run)
    with pytest.raises(OpdError, match="written when it has finished") as found:
        open_report(home, run)
    assert found.value.reason is Reason.REPORT_NOT_FOUND


def test_that_of_a_run_which_ended_early_is_written_anew_each_time(home: Home) -> None:
    run = run_of(3, state=RunState.STOPPED)
    folders = write_run(home, run)
    [(_, first), *_] = contents(home, run)
    folders.samples.unlink()
    [(_, second), *_] = contents(home, run)
    assert second != first


def test_one_that_is_there_is_not_written_again_and_two_may_ask_at_once(home: Home) -> None:
    run = run_of(3)
    folders = write_run(home, run)
    found: list[list[tuple[Path, bytes]]] = []
    threads = [threading.Thread(target=lambda: found.append(contents(home, run))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0][0][0] == folders.report
    assert len(found[0]) > 5
    written = folders.report.stat().st_mtime_ns
    contents(home, run)
    assert folders.report.stat().st_mtime_ns == written
