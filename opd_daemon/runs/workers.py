"""Worker processes: starting them, knowing them by their token, and seeing them off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from opd_daemon.errors import Reason
from opd_daemon.home import Home
from opd_daemon.memory_limit import training_environment
from opd_daemon.runs.worker_log import WorkerLog
from opd_daemon.store import WorkerRecord
from opd_daemon.types import RunState

COMMAND = (sys.executable, "-m", "opd_daemon.runs.worker_main")
GO = b"\n"
TRIM_SECONDS = 0.25
POLL_SECONDS = 0.02
TERM_SECONDS = 5.0
# psutil rounds creation times differently from boot to boot, by clock ticks.
SAME_START_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Exit:
    """What the end of a process that reported no outcome means for its run."""

    state: RunState
    reason: Reason
    message: str


class WorkerProcess:
    """A running worker. Its standard input stays open as long as the daemon lives: its end tells the worker."""

    def __init__(self, run_id: str, token: str, process: asyncio.subprocess.Process, log: WorkerLog) -> None:
        self.run_id = run_id
        self.token = token
        self.pid = process.pid
        self.log = log
        self._process = process
        self._ended = asyncio.create_task(process.wait())

    def record(self) -> WorkerRecord:
        """How to recognise this process later, even from another daemon process."""
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            started = 0.0
        return WorkerRecord(self.run_id, self.pid, started)

    def release(self) -> None:
        """Let the worker begin: it is remembered, so that it can be found even if this daemon is gone."""
        if self._process.stdin:
            self._process.stdin.write(GO)

    async def wait(self) -> int:
        """Wait for the end, keeping the log small meanwhile; the exit code, negative for a signal."""
        while not self._ended.done():
            await asyncio.wait({self._ended}, timeout=TRIM_SECONDS)
            await self._keep_log_small()
        # What the worker itself started must not outlive it.
        signal_group(self.pid, signal.SIGKILL)
        if self._process.stdin:
            self._process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await self._process.stdin.wait_closed()
        return self._ended.result()

    async def _keep_log_small(self) -> None:
        if not self.log.is_long:
            return
        # Who prints without a pause keeps the file locked for itself, so it is held meanwhile.
        signal_group(self.pid, signal.SIGSTOP)
        try:
            await asyncio.to_thread(self.log.trim)
        finally:
            signal_group(self.pid, signal.SIGCONT)

    async def terminate(self) -> None:
        """SIGTERM, and SIGKILL some seconds later, to the worker and all it started; nothing if it has ended."""
        if self._ended.done():
            return
        signal_group(self.pid, signal.SIGTERM)
        await asyncio.wait({self._ended}, timeout=TERM_SECONDS)
        if not self._ended.done():
            signal_group(self.pid, signal.SIGKILL)
            await asyncio.wait({self._ended})


class Workers:
    """Starts workers. `address` is where they reach the daemon; it is set once the daemon listens."""

    def __init__(self, home: Home, *, address: str = "", command: Sequence[str] = COMMAND) -> None:
        self.address = address
        self._home = home
        self._command = tuple(command)
        self._run_of_token: dict[str, str] = {}

    async def start(self, run_id: str, command: Sequence[str] = ()) -> WorkerProcess:
        """Start the worker of a run; `command` starts one that does something else with it.

        Raises:
            OSError: the process can't be started or its log can't be written.
        """
        token = secrets.token_urlsafe(32)
        log = WorkerLog(self._home.run(run_id).worker_log)
        try:
            process = await asyncio.create_subprocess_exec(
                *(command or self._command),
                "--run",
                run_id,
                stdin=asyncio.subprocess.PIPE,
                stdout=log.fileno(),
                stderr=log.fileno(),
                env=self._environment(token),
                start_new_session=True,
            )
        except OSError:
            log.close()
            raise
        self._run_of_token[token] = run_id
        return WorkerProcess(run_id, token, process, log)

    def discharge(self, worker: WorkerProcess) -> None:
        """The worker has ended: its token opens nothing any more."""
        self._run_of_token.pop(worker.token, None)
        worker.log.close()

    def run_for_token(self, token: str) -> str | None:
        """The run whose live worker holds this token; None when there is none."""
        offered = token.encode()
        # Every token is compared, each in constant time, so that an answer's delay tells nothing of a near miss.
        found = [
            run_id for known, run_id in self._run_of_token.items() if secrets.compare_digest(known.encode(), offered)
        ]
        return found[0] if found else None

    @property
    def count(self) -> int:
        """Workers that live."""
        return len(self._run_of_token)

    def _environment(self, token: str) -> dict[str, str]:
        own = {"OPD_ADDRESS": self.address, "OPD_WORKER_TOKEN": token, "OPD_HOME": str(self._home.root)}
        return {**training_environment(), **own}


def meaning_of_exit(code: int, last_line: str) -> Exit:
    """What it means that a worker ended with `code` without having reported an outcome."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        # Linux counts what it kills for lack of memory, and it didn't count this one.
        guess = " (out of memory?)" if -code == signal.SIGKILL and sys.platform != "linux" else ""
        message = f"the worker was killed by {name}{guess}; resume goes on from the last checkpoint"
        return Exit(RunState.INTERRUPTED, Reason.WORKER_DIED, message)
    said = f": {last_line}" if last_line else " and printed nothing"
    return Exit(RunState.FAILED, Reason.WORKER_DIED, f"the worker ended with exit code {code}{said}")


def end_orphan(worker: WorkerRecord, home: Home) -> None:
    """End a worker of this home that outlived its daemon, if that process is still the one that was started; blocks."""
    try:
        process = psutil.Process(worker.pid)
        if not _is_worker(process, worker, home):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            # A stopped process takes no other signal before it goes on.
            signal_group(worker.pid, number)
            signal_group(worker.pid, signal.SIGCONT)
            if _ended(process, TERM_SECONDS):
                return
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return


def _is_worker(process: psutil.Process, worker: WorkerRecord, home: Home) -> bool:
    if worker.run_id not in process.cmdline():
        return False
    # The clock may have been set since, and with it what the system says of the start: the environment stays.
    same_start = abs(process.create_time() - worker.started) <= SAME_START_SECONDS
    return same_start or process.environ().get("OPD_HOME") == str(home.root)


def _ended(process: psutil.Process, seconds: float) -> bool:
    """Whether a process ends in time; one that only waits for its parent to notice has ended."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a worker and everything in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
