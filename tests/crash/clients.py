"""Clients that note what they were told, and one that follows the log over every restart."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from pathlib import Path

from opd_daemon.client import Client
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Event, Run, RunState
from tests.crash.model import Promises
from tests.crash.stage import Daemon, run_values

# What a client may hear when a daemon dies, or when somebody else was faster.
EXPECTED = frozenset(
    {
        Reason.DAEMON_NOT_RUNNING,
        Reason.SHUTTING_DOWN,
        Reason.RUN_STATE_CONFLICT,
        Reason.RUN_NOT_FOUND,
        Reason.DEADLINE_EXCEEDED,
        Reason.CANCELLED,
    }
)
MOST_LIVE = 3
MOST_RUNS = 12


class Follower:
    """Watches from the beginning; `revisions` is what it was shown, in its order."""

    def __init__(self, daemon: Daemon) -> None:
        self.revisions: list[int] = []
        self.fault: OpdError | None = None
        self._client = daemon.client()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for item in self._client.watch(0, patience=120.0):
                if isinstance(item, Event):
                    self.revisions.append(item.revision)
        except OpdError as fault:
            self.fault = fault
        except ValueError:  # the channel was closed: the test is over
            return

    def close(self) -> None:
        self._client.close()

    def gaps(self) -> list[str]:
        pairs = itertools.pairwise([0, *self.revisions])
        return [f"{after} after {before}" for before, after in pairs if after != before + 1]


class User:
    """Does something with runs, again and again, and remembers the answers."""

    def __init__(self, root: Path, promises: Promises, seed: int) -> None:
        self._root = root
        self._promises = promises
        self._random = random.Random(seed)
        self._requests = itertools.count()
        self._pending: tuple[str, dict[str, object]] | None = None

    def act_for(self, daemon: Daemon, seconds: float) -> None:
        """Act until the time is over or the daemon is gone."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OpdError), daemon.client() as client:
            while time.monotonic() < end and daemon.alive:
                try:
                    self._act(client)
                except OpdError as error:
                    if error.reason not in EXPECTED:
                        raise AssertionError(f"{error.reason}: {error}") from error
                time.sleep(self._random.uniform(0.0, 0.03))

    def _act(self, client: Client) -> None:
        runs = list(client.runs())
        live = [run for run in runs if not run.state.resting]
        resting = [run for run in runs if run.state.resting]
        if self._pending or len(live) < MOST_LIVE:
            resumable = [run for run in resting if run.state.resumable]
            if not self._pending and resumable and self._random.random() < 0.6:
                self._resume(client, self._random.choice(resumable))
            else:
                self._create(client)
        elif len(runs) > MOST_RUNS and resting:
            self._delete(client, self._random.choice(resting))
        elif self._random.random() < 0.1:
            self._stop(client, self._random.choice(live))

    def _create(self, client: Client) -> None:
        # A request whose answer was lost is made again as it was.
        number = next(self._requests)
        fresh = (f"request-{number}", run_values(self._root, run_id=f"run{number}", num_steps=12))
        request_id, values = self._pending = self._pending or fresh
        run, _ = client.create_run(values, request_id=request_id)
        self._pending = None
        self._promises.created[request_id] = run.run_id

    def _resume(self, client: Client, run: Run) -> None:
        again, _ = client.resume(run.run_id)
        self._promises.attempts[run.run_id] = again.attempt

    def _stop(self, client: Client, run: Run) -> None:
        stopped = client.stop(run.run_id)
        if stopped.state in (RunState.STOPPING, RunState.STOPPED):
            self._promises.stopped.add((stopped.run_id, stopped.attempt))

    def _delete(self, client: Client, run: Run) -> None:
        client.delete(run.run_id)
        self._promises.deleted.add(run.run_id)
