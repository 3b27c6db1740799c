"""A worker that prints without end fills no disk, and its last words stay."""

from __future__ import annotations

from pathlib import Path

from opd_daemon.runs.worker_log import CUT, KEPT_BYTES, LIMIT_BYTES, WorkerLog


def test_a_long_log_is_cut_to_its_end(tmp_path: Path) -> None:
    log = WorkerLog(tmp_path / "logs" / "r1.log")
    with log.path.open("ab", buffering=0) as worker:
        worker.write(b"x" * (LIMIT_BYTES + 1) + b"\nlast words\n\n")
        log.trim()
        assert log.path.stat().st_size == KEPT_BYTES + len(CUT)
        assert log.path.read_bytes().startswith(CUT)
        assert log.last_line() == "last words"
        worker.write(b"and more\n")
    assert log.last_line() == "and more"
    log.close()


def test_a_short_log_stays_as_it_is_and_goes_on_with_the_next_attempt(tmp_path: Path) -> None:
    for number in range(2):
        log = WorkerLog(tmp_path / "r1.log")
        log._file.write(f"attempt {number}\n".encode())
        log.trim()
        log.close()
    assert (tmp_path / "r1.log").read_text() == "attempt 0\nattempt 1\n"


def test_a_worker_that_said_nothing_has_no_last_line(tmp_path: Path) -> None:
    log = WorkerLog(tmp_path / "r1.log")
    assert log.last_line() == ""
    log.close()
