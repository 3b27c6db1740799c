"""Checks and plans take nobody else's threads, and those that measure not each other's."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.runs.preflight import THREADS, Preflight
from opd_daemon.types import Plan
from tests.asynchronous import asynchronous
from tests.runs.daemon import PLAN, Stage

# More than the threads of asyncio's own pool, however many processors there are.
CROWD = 40


class SlowStage(Stage):
    """A machine whose measuring lasts until `measured`."""

    measured = threading.Event()

    def _plan(self, request: PlanRequest) -> Plan:
        if request.measure:
            self.measured.wait()
        return super()._plan(request)


@asynchronous
async def test_a_crowd_that_measures_holds_up_neither_files_nor_runs(tmp_path: Path) -> None:
    stage = SlowStage(tmp_path)
    async with stage.daemon() as daemon:
        crowd = [asyncio.create_task(daemon.runs.create(stage.values(), validate_only=True)) for _ in range(CROWD)]
        try:
            await asyncio.sleep(0.5)
            await asyncio.wait_for(asyncio.to_thread(tmp_path.exists), 5.0)
            await asyncio.wait_for(daemon.start(), 10.0)
        finally:
            stage.measured.set()
        assert all(run.plan == PLAN for run in await asyncio.gather(*crowd))


@asynchronous
async def test_what_waits_for_a_thread_when_the_daemon_stops_is_told_so() -> None:
    gate, begun = threading.Event(), threading.Barrier(THREADS + 1)

    def work() -> str:
        begun.wait()
        gate.wait()
        return "done"

    preflight = Preflight(lambda *_: [], lambda _: PLAN)
    running = [asyncio.create_task(preflight.run(work)) for _ in range(THREADS)]
    try:
        await asyncio.to_thread(begun.wait)
        waiting = asyncio.create_task(preflight.run(str))
        await asyncio.sleep(0)
        preflight.close()
        with pytest.raises(OpdError) as caught:
            await asyncio.wait_for(waiting, 5.0)
        assert caught.value.reason is Reason.SHUTTING_DOWN
        with pytest.raises(OpdError, match="the daemon stops"):
            await preflight.run(str)
    finally:
        gate.set()
    assert await asyncio.gather(*running) == ["done", "done"]
