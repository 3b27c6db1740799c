"""A daemon of our own for as long as this process lives: `opd serve` as a child that ends with its standard input."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from opd_daemon.client.client import Client
from opd_daemon.client.connection import find_endpoint
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home

START_PATIENCE = 60.0
POLL_SECONDS = 0.05


class LocalDaemon:
    """Starts a daemon for `home` on entry; on exit, or when this process dies in whatever way, the daemon stops too.

    The daemon is in a session of its own, so Ctrl-C in the terminal reaches this process only.
    allowed_roots: folders in which paths may be named, besides the usual ones.
    """

    def __init__(self, home: Home, *, stop_patience: float = 30.0, allowed_roots: Sequence[Path] = ()) -> None:
        self.home = home
        self._allowed_roots = allowed_roots
        self.log = home.logs / "daemon.log"
        self._stop_patience = stop_patience
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.home.make()
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        start = self.log.stat().st_size if self.log.exists() else 0
        command = [
            sys.executable,
            "-m",
            "opd_daemon.cli",
            "serve",
            "--home",
            str(self.home.root),
            "--until-stdin-closes",
            *(f"--allow-root={folder}" for folder in self._allowed_roots),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_it_serves(self._process, start)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the daemon; 0 when it is not running."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    def client(self) -> Client:
        """A client of this daemon, whatever the environment says."""
        endpoint = find_endpoint(self.home)
        return Client.find(self.home, endpoint.address, endpoint.token)

    def close(self) -> None:
        """Stop the daemon: politely first, then by signal."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        steps: tuple[Callable[[], None], ...] = (lambda: None, process.terminate, process.kill)
        for step, patience in zip(steps, (self._stop_patience, 5.0, 5.0), strict=True):
            step()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return

    def _wait_until_it_serves(self, process: subprocess.Popen[bytes], log_start: int) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise OpdError(Reason.DAEMON_NOT_RUNNING, _last_words(self.log, log_start, process.returncode))
            with contextlib.suppress(OpdError):
                if find_endpoint(self.home).pid == process.pid:
                    with self.client() as client:
                        client.teacher()
                    return
            time.sleep(POLL_SECONDS)
        message = f"the daemon did not answer within {START_PATIENCE:.0f} s; see {self.log}"
        raise OpdError(Reason.DAEMON_NOT_RUNNING, message)


def _last_words(log: Path, start: int, exit_code: int) -> str:
    """One line that says why the daemon did not start."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("opd: ") if lines else f"exit code {exit_code}"
    return f"the daemon did not start: {said} (log: {log})"
