"""A daemon that lives as long as the program that started it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from opd_daemon.client import LocalDaemon
from opd_daemon.errors import OpdError
from opd_daemon.home import Home

STARTS_ONE_AND_WAITS = """
import sys, time
from pathlib import Path
from opd_daemon.client import LocalDaemon
from opd_daemon.home import Home
with LocalDaemon(Home(Path(sys.argv[1]))) as daemon:
    print(daemon.pid, flush=True)
    time.sleep(600)
"""


def test_leaving_the_block_ends_the_daemon(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with LocalDaemon(home) as daemon:
        pid = daemon.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    assert daemon.pid == 0
    assert not home.discovery.exists()


def test_a_home_may_have_any_name(tmp_path: Path) -> None:
    for name in ("with space", "100% mine, really?#1"):
        with LocalDaemon(Home(tmp_path / name)) as daemon, daemon.client() as client:
            assert list(client.runs()) == []


def test_kill_9_of_the_program_ends_its_daemon(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_ONE_AND_WAITS, str(tmp_path / "home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        program.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the daemon outlived the program that started it"
        time.sleep(0.05)


def test_a_daemon_that_can_not_start_says_why_in_one_line(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with (
        LocalDaemon(home) as first,
        pytest.raises(OpdError, match=rf"did not start: .*\(pid {first.pid}\)") as found,
        LocalDaemon(home),
    ):
        pass
    assert "\n" not in str(found.value)
