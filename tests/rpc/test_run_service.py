"""Runs over the wire: lists that clients can take, and a cursor from which nothing is missed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from opd_daemon.rpc.access import Caller, caller
from opd_daemon.rpc.interceptor import Context
from opd_daemon.rpc.run_service import LIST_BYTES, RunServicer, _thinned
from opd_daemon.store import Store
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.wire.runs import config_to_proto
from tests.asynchronous import asynchronous
from tests.runs.daemon import Daemon, Stage

CONTEXT = cast(Context, None)
NONE = cast(Any, None)


def servicer(daemon: Daemon) -> RunServicer:
    caller.set(Caller())
    return RunServicer(daemon.runs, daemon.events, NONE, uploads=NONE, roots=NONE)


@asynchronous
async def test_a_request_that_comes_again_gets_a_cursor_before_its_run(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        service = servicer(daemon)
        await daemon.create()
        request = pb.CreateRunRequest(request_id="once", config=config_to_proto(daemon.stage.values()))
        first = await service.CreateRun(request, CONTEXT)
        await daemon.create()
        again = await service.CreateRun(request, CONTEXT)
        assert again.run.run_id == first.run.run_id
        for answer in (first, again):
            events, _ = await daemon.events.read(partial(Store.events_after, revision=answer.revision))
            told = [event.payload["state"] for event in events if event.run_id == first.run.run_id]
            assert told[0] == "PENDING"


@asynchronous
async def test_a_list_of_large_runs_comes_in_pages_that_clients_take(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        service = servicer(daemon)
        names = [await daemon.create(run_id=f"r{number}", eval_tasks=200_000 * "x") for number in range(12)]
        found, token = [], ""
        while not found or token:
            answer = await service.ListRuns(pb.ListRunsRequest(page_size=500, page_token=token), CONTEXT)
            assert answer.ByteSize() < 2 * LIST_BYTES
            assert answer.runs
            found += [run.run_id for run in answer.runs]
            token = answer.next_page_token
        assert found == names[::-1]


def test_rows_are_thinned_evenly() -> None:
    assert _thinned(range(10), 10) == list(range(10))
    assert _thinned(range(1000), 4) == [0, 333, 666, 999]
