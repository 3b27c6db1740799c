"""A real daemon, as a process, with real workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from opd_daemon.client import Client
from opd_daemon.home import Home

START_SECONDS = 60.0
END_SECONDS = 60.0


class DaemonProcess:
    """`opd serve` on a home of its own, with more arguments where given; `kill` is kill -9."""

    def __init__(self, home: Home, *arguments: str) -> None:
        self.home = home
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "opd_daemon.cli", "serve", "--until-stdin-closes", *self.arguments]
        environment = {**os.environ, "OPD_HOME": str(self.home.root)}
        self.log = (self.home.root / "daemon.log").open("ab")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, env=environment
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._published():
            assert self.process.poll() is None, (self.home.root / "daemon.log").read_text()
            assert time.monotonic() < deadline, "the daemon did not come up"
            time.sleep(0.05)

    def _published(self) -> bool:
        try:
            return bool(json.loads(self.home.discovery.read_text())["pid"] == self.process.pid)
        except (OSError, ValueError):
            return False

    def client(self) -> Client:
        return Client.find(self.home)

    def workers(self) -> list[psutil.Process]:
        return self.children("opd_daemon.runs.worker_main")

    def children(self, program: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if program in child.cmdline():
                    found.append(child)
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)
        self._close()

    def stop(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(END_SECONDS)
        self.log.close()
        return code

    def _close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    process = DaemonProcess(home)
    yield process
    if process.process.poll() is None:
        process.stop()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    questions = [f"Tell me about number {number}." for number in range(24)]
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return path
