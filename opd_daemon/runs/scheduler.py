"""Which run is done next: the oldest that waits, as soon as there is a place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from opd_daemon.errors import OpdError, Reason
from opd_daemon.runs.attempt import Attempt, RunServices, teacher_folder
from opd_daemon.runs.states import LIVE, moved
from opd_daemon.types import Event, Run, RunState

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Scheduler:
    """Starts attempts at PENDING runs, `max_concurrent_runs` at a time."""

    def __init__(self, services: RunServices, max_concurrent_runs: int) -> None:
        self._services = services
        self._max_concurrent_runs = max_concurrent_runs
        self._attempts: dict[str, tuple[Attempt, asyncio.Task[None]]] = {}
        self._woken = asyncio.Event()
        self._holder = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._schedule())

    def wake(self) -> None:
        """Look again: a run waits, or a place is free."""
        self._woken.set()

    def attempt(self, run_id: str) -> Attempt | None:
        """The attempt at a run that is going on, if any; it lasts until the worker process is gone."""
        return self._attempts[run_id][0] if run_id in self._attempts else None

    def busy(self) -> list[str]:
        """Runs at which an attempt is going on."""
        return list(self._attempts)

    @property
    def holder(self) -> str:
        """The run for whose sake no attempt is started now; empty when none is."""
        return self._holder

    @contextmanager
    def held(self, run_id: str) -> Iterator[None]:
        """Start nothing meanwhile, for the sake of a run that rests.

        Raises:
            OpdError: RUN_STATE_CONFLICT while an attempt is going on, or the place is held already.
        """
        if self._attempts:
            other = next(iter(self._attempts))
            message = f"run {other!r} is under way; stop it, or wait until it is done"
            raise OpdError(Reason.RUN_STATE_CONFLICT, message, run_id=other)
        if self._holder:
            message = f"models of run {self._holder!r} are being compared; wait until that is done"
            raise OpdError(Reason.RUN_STATE_CONFLICT, message, run_id=self._holder)
        self._holder = run_id
        try:
            yield
        finally:
            self._holder = ""
            self.wake()

    async def wait(self, run_id: str) -> None:
        """Wait until no attempt at this run is going on."""
        if run_id in self._attempts:
            await asyncio.wait({self._attempts[run_id][1]})

    async def close(self, grace: float) -> None:
        """Start nothing more, and let what is going on come to rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await asyncio.gather(*(self._shut_down(*entry, grace) for entry in self._attempts.values()))

    async def _shut_down(self, attempt: Attempt, task: asyncio.Task[None], grace: float) -> None:
        attempt.shut_down(grace)
        try:
            await self._services.ledger.change(attempt.run_id, _stopping)
        except OpdError as fault:
            # Its worker isn't told by an event then, but by a signal when the grace is over.
            logger.warning("run %s: that it is stopped can't be stored: %s", attempt.run_id, fault)
        await asyncio.wait({task})

    async def _schedule(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._start_pending()
            except Exception:
                # A store that can't be read now must not be the end of all scheduling.
                logger.exception("pending runs can't be looked up; trying again")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            await self._woken.wait()

    async def _start_pending(self) -> None:
        pending = await self._services.events.read(
            lambda store: store.list_runs({RunState.PENDING}, limit=-1, oldest_first=True)
        )
        for stored in pending:
            if self._holder or len(self._attempts) >= self._max_concurrent_runs:
                return
            if stored.run.run_id in self._attempts:
                continue
            teachers = {attempt.teacher for attempt, _ in self._attempts.values()}
            # One teacher is resident: a run with another one waits until the runs before it are done.
            if teachers - {teacher_folder(stored.run)}:
                return
            self._begin(stored.run)

    def _begin(self, run: Run) -> None:
        attempt = Attempt(run, self._services)
        task = asyncio.create_task(attempt.carry_out(), name=f"run {run.run_id}")
        self._attempts[run.run_id] = (attempt, task)
        task.add_done_callback(lambda done: self._ended(run.run_id, done))

    def _ended(self, run_id: str, task: asyncio.Task[None]) -> None:
        del self._attempts[run_id]
        self.wake()
        if not task.cancelled() and task.exception() is not None:
            logger.error("run %s was left as it is: %s", run_id, task.exception())


def _stopping(run: Run) -> tuple[Run, Event] | None:
    if run.state not in LIVE or run.state is RunState.STOPPING:
        return None
    return moved(run, RunState.STOPPING, message="the daemon stops")
