"""The whole life of a run, pushed on step by step by a client who doesn't give up when the daemon dies."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from opd_daemon.client import Client
from opd_daemon.errors import OpdError
from opd_daemon.types import Run, RunState
from tests.crash.clients import EXPECTED
from tests.crash.model import Promises
from tests.crash.stage import Daemon, run_values

STEPS = 4
PATIENCE = 60.0


class Life:
    """create → stop → resume → succeed → download → delete, then the next run."""

    def __init__(self, daemon: Daemon, root: Path) -> None:
        self.promises = Promises()
        self._daemon = daemon
        self._root = root
        self._number = 0
        self._asked_to_stop = False
        self.lived = 0

    @property
    def run_id(self) -> str:
        return f"life{self._number}"

    def until_hit(self, point: str) -> None:
        """Go on until somebody died at this point."""
        hits = self._daemon.points_hit().count(point)
        end = time.monotonic() + PATIENCE
        while self._daemon.points_hit().count(point) == hits:
            assert time.monotonic() < end, f"{point} was never reached"
            assert self._daemon.alive, f"the daemon died elsewhere:\n{self._daemon.log.read_text()[-3000:]}"
            self.push(drain=point.startswith("drain."))

    def until(self, state: RunState) -> None:
        end = time.monotonic() + PATIENCE
        while self.push() is not state:
            assert time.monotonic() < end, f"{self.run_id} never became {state}"

    def push(self, *, drain: bool = False) -> RunState | None:
        """Do the next thing; the run's state as it was found, None when nobody answers."""
        with contextlib.suppress(OpdError), self._daemon.client() as client:
            try:
                run, _ = self._created(client)
                self._act(client, run, drain=drain)
            except OpdError as error:
                if error.reason not in EXPECTED:
                    raise AssertionError(f"{error.reason}: {error}") from error
                return None
            time.sleep(0.02)
            return run.state
        return None

    def _created(self, client: Client) -> tuple[Run, int]:
        values = run_values(self._root, run_id=self.run_id, num_steps=STEPS)
        client.create_run(values, request_id=self.run_id)
        self.promises.created[self.run_id] = self.run_id
        return client.run(self.run_id)

    def _act(self, client: Client, run: Run, *, drain: bool) -> None:
        if run.state is RunState.RUNNING and drain:
            self._daemon.stop()
        elif run.state is RunState.RUNNING and not self._asked_to_stop:
            client.stop(run.run_id)
            self._asked_to_stop = True
            self.promises.stopped.add((run.run_id, run.attempt))
        elif run.state.resumable:
            again, _ = client.resume(run.run_id)
            self.promises.attempts[run.run_id] = again.attempt
        elif run.state is RunState.SUCCEEDED:
            assert self._daemon.home.run(run.run_id).config.exists()
            client.download_adapter(run.run_id, self._root / "downloaded")
            self._delete(client, run.run_id)

    def _delete(self, client: Client, run_id: str) -> None:
        # Whether it was done is not known when the answer is lost; the next run has another name in any case.
        self._number += 1
        self._asked_to_stop = False
        self.lived += 1
        client.delete(run_id)
        self.promises.deleted.add(run_id)
