"""A daemon whose gRPC server has died ends with it, with exit code 1: who serves nobody must not seem to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from opd_daemon.home import Home

DYING = """
import asyncio, pathlib, sys
from opd_daemon.home import Home
from opd_daemon.rpc import front
from opd_daemon.rpc.server import ServeSettings, serve

async def failing(self, seconds):
    await asyncio.sleep(seconds)
    raise RuntimeError("no more calls")

opened = front.Front.open

async def open_and_die(self):
    await opened(self)
    self.server.wait_for_termination = failing.__get__(self.server)

front.Front.open = open_and_die
serve(ServeSettings(Home(pathlib.Path(sys.argv[1])), port=None))
"""


def test_the_daemon_ends_with_its_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(home)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "the gRPC server died: RuntimeError: no more calls" in done.stderr
    assert not Home(home).discovery.exists()
