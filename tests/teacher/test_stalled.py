"""Whoever stops reading scores holds a few of them up, not all of them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from opd_daemon.teacher import TeacherService, calls
from opd_daemon.teacher.batching import ScoreItem
from opd_daemon.types import ScoreRequest, ScoreWants
from tests.asynchronous import until
from tests.teacher.resident import Home


@dataclass(frozen=True)
class Load:
    """A call of `sequences`, each of `tokens` and with scores of `top_k` tokens at each."""

    sequences: int
    tokens: int
    top_k: int

    @property
    def bytes_of_one(self) -> int:
        return 4 * (self.tokens - 1) * (3 + 2 * self.top_k)

    def requests(self) -> list[ScoreRequest]:
        ids = np.random.default_rng(1).integers(0, 400, (self.sequences, self.tokens)).astype(np.int32)
        return [ScoreRequest(row, 1, ScoreWants(top_k=self.top_k)) for row in ids]


SMALL = Load(sequences=40, tokens=64, top_k=100)
# Half as much again as may wait for its reader: 98 MB.
LARGE = Load(sequences=60, tokens=512, top_k=400)
MOST_BYTES = 70 << 20


async def queued_for_one_who_reads_once(service: TeacherService, load: Load, patch: pytest.MonkeyPatch) -> int:
    """How many sequences were queued by the time the teacher had nothing to do; all come in the end."""
    engine, queued = service._open().engine, 0
    take = engine.score

    def counted(digest: str, items: Sequence[ScoreItem]) -> None:
        nonlocal queued
        queued += len(items)
        take(digest, items)

    patch.setattr(engine, "score", counted)
    reader = service.score(load.requests(), use_cache=False)
    first, _ = await anext(reader)

    async def idle() -> bool:
        return not service.queued_tokens

    await until(idle)
    before_the_rest = queued
    rest = [index async for index, _ in reader]
    assert sorted([first, *rest]) == list(range(load.sequences))
    return before_the_rest


def test_no_more_is_computed_ahead_of_a_reader_than_its_share(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "BYTES_AHEAD", 3 * SMALL.bytes_of_one)

    async def work(service: TeacherService) -> None:
        assert await queued_for_one_who_reads_once(service, SMALL, monkeypatch) <= 4

    home.run(work, tiny_teacher)


def test_a_reader_who_stops_has_a_fixed_share_of_memory(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the share as it is: a call of half as much again is not in memory as a whole."""

    async def work(service: TeacherService) -> None:
        queued = await queued_for_one_who_reads_once(service, LARGE, monkeypatch)
        assert queued * LARGE.bytes_of_one < MOST_BYTES

    home.run(work, tiny_teacher)
