"""What can be found out about a run before anything loads, without holding up anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar, TypeVarTuple

from opd_daemon.config import RunConfig
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.trainer import TrainerInfo
from opd_daemon.types import Plan

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

THREADS = 2


class Preflight:
    """Checks and plans of runs, on threads of their own: to measure a machine may take one for minutes.

    check: every fault of a configuration; that of its options only when the trainer is known. plan: time and memory.
    Both functions block.
    """

    def __init__(
        self,
        check: Callable[[RunConfig, TrainerInfo | None], list[FieldViolation]],
        plan: Callable[[PlanRequest], Plan],
    ) -> None:
        self.check = check
        self._plan = plan
        self._threads = ThreadPoolExecutor(THREADS, "preflight")
        self._measuring = asyncio.Lock()
        self._closed = False

    async def plan(self, request: PlanRequest) -> Plan:
        """The plan of a run. Raises what planning raises, and SHUTTING_DOWN."""
        if not request.measure:
            return await self.run(self._plan, request)
        # One at a time measures, so that a thread is left for all the others.
        async with self._measuring:
            return await self.run(self._plan, request)

    async def run(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Do something that blocks on one of the threads.

        Raises:
            OpdError: SHUTTING_DOWN when these are closed before its turn has come.
        """
        if self._closed:
            raise _closed()
        # As with `asyncio.to_thread`, what is logged there names the run.
        call = partial(copy_context().run, work, *arguments)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _closed() from None

    def close(self) -> None:
        """Begin nothing more. What a thread is doing goes on to its end, and nobody waits for it here."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


def _closed() -> OpdError:
    return OpdError(Reason.SHUTTING_DOWN, "the daemon stops; try again when it is back")
