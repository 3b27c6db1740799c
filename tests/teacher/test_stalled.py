"""Whoever stops reading scores holds a few of them up, not all of them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from opd_daemon.teacher import calls
from opd_daemon.teacher.batching import ScoreItem
from opd_daemon.types import ScoreRequest, ScoreWants
from tests.asynchronous import asynchronous, until
from tests.teacher.resident import Home

SEQUENCES, TOKENS, TOP_K = 40, 64, 100
BYTES_OF_ONE = 4 * (TOKENS - 1) * (3 + 2 * TOP_K)


def test_no_more_is_computed_ahead_of_a_reader_than_its_share(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "BYTES_AHEAD", 3 * BYTES_OF_ONE)

    @asynchronous
    async def scenario() -> None:
        async with Home(tmp_path).teacher(tiny_teacher) as service:
            engine, queued = service._open().engine, 0
            take = engine.score

            def counted(digest: str, items: Sequence[ScoreItem]) -> None:
                nonlocal queued
                queued += len(items)
                take(digest, items)

            monkeypatch.setattr(engine, "score", counted)
            ids = np.random.default_rng(1).integers(0, 400, (SEQUENCES, TOKENS)).astype(np.int32)
            reader = service.score([ScoreRequest(row, 1, ScoreWants(top_k=TOP_K)) for row in ids], use_cache=False)
            first, _ = await anext(reader)

            async def idle() -> bool:
                return not service.queued_tokens

            await until(idle)
            assert queued <= 4
            rest = [index async for index, _ in reader]
            assert sorted([first, *rest]) == list(range(SEQUENCES))

    scenario()
