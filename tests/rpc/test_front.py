"""A gRPC server that ends by itself is noticed, for the daemon to end with it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from opd_daemon.rpc import front
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
