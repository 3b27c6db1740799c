"""How many may watch: clients are counted while they are there, and a worker is never turned away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from opd_daemon.events import EventLog
from opd_daemon.home import Home
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.interceptor import Border
from opd_daemon.rpc.run_service import RunServicer
from opd_daemon.runs.uploads import Uploads
from opd_daemon.store import Store
from opd_daemon.v1 import run_pb2, run_pb2_grpc
from tests.asynchronous import asynchronous, until
from tests.test_store import add_run

CLIENT = "client"


class Runs:
    """A run manager that knows the run and nothing else."""

    async def get(self, run_id: str) -> None:
        assert run_id == "r1"


@asynccontextmanager
async def served(folder: Path, max_watchers: int) -> AsyncIterator[tuple[EventLog, run_pb2_grpc.RunServiceAsyncStub]]:
    store = Store(folder / "opd.db")
    add_run(store)
    log, runs = EventLog(store, max_watchers=max_watchers), Runs()
    gate = Gate(CLIENT, lambda token: "r1" if token == "worker" else None)
    server = grpc.aio.server(interceptors=[Border(gate, Home(folder))])
    servicer: Any = RunServicer(runs, log, runs, uploads=Uploads(folder), roots=AllowedRoots.of([folder]))  # type: ignore[arg-type]
    run_pb2_grpc.add_RunServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield log, run_pb2_grpc.RunServiceStub(channel)  # type: ignore[misc]
    log.close("over")
    await server.stop(1.0)
    await log.aclose()


def watch(stub: run_pb2_grpc.RunServiceAsyncStub, token: str = CLIENT) -> Any:
    request = run_pb2.WatchEventsRequest(run_id="r1")
    return stub.WatchEvents(request, metadata=[("authorization", f"Bearer {token}")])


@asynchronous
async def test_over_the_limit_clients_are_told_and_workers_are_let_in(tmp_path: Path) -> None:
    async with served(tmp_path, max_watchers=1) as (log, stub):
        first = watch(stub)
        assert (await first.read()).HasField("started")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch(stub).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "start the daemon with a larger --max-watchers" in str(caught.value.details())
        worker = watch(stub, "worker")
        assert (await worker.read()).HasField("started")
        assert log.watchers == 2


@asynchronous
async def test_a_client_that_left_makes_room_for_the_next(tmp_path: Path) -> None:
    async with served(tmp_path, max_watchers=1) as (log, stub):

        async def nobody() -> bool:
            return log.watchers == 0

        for _ in range(5):
            call = watch(stub)
            await call.read()
            call.cancel()
            await until(nobody)


@asynchronous
async def test_a_client_that_reads_nothing_leaves_too(tmp_path: Path) -> None:
    async with served(tmp_path, max_watchers=1) as (log, stub):
        call = watch(stub)

        async def opened() -> bool:
            return log.watchers == 1

        async def nobody() -> bool:
            return log.watchers == 0

        await until(opened)
        call.cancel()
        await until(nobody)
