"""A teacher service on a tiny model, and the same model's distributions computed the plain way in float64."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm import load

from opd_daemon.teacher import TeacherService
from opd_daemon.types import CachedScores, GeneratedToken, GenerateRequest, LoadProgress, ScoreRequest

T = TypeVar("T")


class Home:
    """Folders of one daemon, and services that start on them."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "teacher_cache"
        self.memo = root / "digests.json"

    @asynccontextmanager
    async def teacher(self, model: Path | None = None, **settings: Any) -> AsyncIterator[TeacherService]:
        service = TeacherService(self.cache, self.memo, **({"cache_limit_bytes": 1 << 24} | settings))
        await service.start()
        try:
            if model:
                await load_model(service, model)
            yield service
        finally:
            await service.close()

    def run(self, work: Callable[[TeacherService], Awaitable[T]], model: Path | None = None, **settings: Any) -> T:
        async def main() -> T:
            async with self.teacher(model, **settings) as service:
                return await work(service)

        return asyncio.run(asyncio.wait_for(main(), 120))

    def entries(self) -> list[Path]:
        return sorted(file for file in self.cache.glob("*/*") if file.is_file())


async def load_model(service: TeacherService, model: Path | str) -> list[LoadProgress]:
    return [progress async for progress in service.load(str(model))]


async def score_all(service: TeacherService, requests: Sequence[ScoreRequest], **settings: Any) -> list[CachedScores]:
    found: dict[int, CachedScores] = {}
    async with aclosing(service.score(requests, **settings)) as results:
        async for index, result in results:
            assert index not in found
            found[index] = result
    assert sorted(found) == list(range(len(requests)))
    return [found[index] for index in range(len(requests))]


async def generate_all(
    service: TeacherService, requests: Sequence[GenerateRequest], **settings: Any
) -> list[list[GeneratedToken]]:
    found: list[list[GeneratedToken]] = [[] for _ in requests]
    async for index, token in service.generate(requests, **settings):
        found[index].append(token)
    return found


def reference(model: Path, ids: npt.NDArray[np.int32], masked: Sequence[int] = ()) -> npt.NDArray[np.float64]:
    """Log-probabilities (n − 1, V) of tokens 1 … n−1, in float64 over a plain forward of real tokens only."""
    loaded, tokenizer = load(str(model))
    logits = np.array(loaded(mx.array(ids[None]))[0, :-1].astype(mx.float32), np.float64)
    logits = logits[:, : len(tokenizer.get_vocab())]
    logits[:, list(masked)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def random_ids(size: int, seed: int = 0, vocab: int = 400) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab, size).astype(np.int32)
