"""The gRPC server under the daemon: what it is built on, and that its end is noticed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from grpc._cython import cygrpc

from opd_daemon.rpc import core_server, front
from opd_daemon.rpc.front import Front


def test_a_server_that_died_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(front, "ALIVE_SECONDS", 0.01)
    asked = []

    async def termination(seconds: float) -> bool:
        asked.append(seconds)
        await asyncio.sleep(seconds)
        if len(asked) == 3:
            raise RuntimeError("no more calls")
        return True

    dying = cast("Front", SimpleNamespace(server=SimpleNamespace(wait_for_termination=termination)))
    asyncio.run(asyncio.wait_for(Front.died(dying), 10))
    assert asked == 3 * [0.01]
    assert "the gRPC server died: RuntimeError: no more calls" in caplog.text


@pytest.mark.anyio
async def test_a_grpcio_whose_methods_are_not_registered_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every call would be answered as one of an unknown method."""
    usual = cygrpc.AioServer
    assert type(core_server.core_server((), (), list)._server) is core_server._CoreServer
    assert cygrpc.AioServer is usual

    monkeypatch.setattr(core_server, "REGISTERED", "_not_there")
    assert type(core_server.core_server((), (), list)._server) is usual
