"""The cache on disk: warm answers equal cold ones, damage is a miss with a warning, the oldest goes first."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from opd_daemon.teacher import TeacherService
from opd_daemon.teacher.cache import HEADER_BYTES, MAGIC
from opd_daemon.types import CachedScores, CacheStats, GenerateRequest, ScoreRequest, Scores, ScoreWants
from tests.teacher.resident import Home, generate_all, random_ids, score_all

REQUEST = ScoreRequest(
    random_ids(20), 4, ScoreWants(top_k=8, log_z_temperatures=(2.0,), hidden=True), np.ones((16, 3), np.int32)
)


def ask(home: Home, model: Path, *requests: ScoreRequest, **settings: object) -> tuple[list[CachedScores], CacheStats]:
    async def work(service: TeacherService) -> tuple[list[CachedScores], CacheStats]:
        found = await score_all(service, requests or (REQUEST,))
        return found, service.cache_stats()

    return home.run(work, model, **settings)


def assert_equal(first: Scores, second: Scores) -> None:
    assert first.hidden_dtype == second.hidden_dtype
    assert first.arrays().keys() == second.arrays().keys()
    for name, value in first.arrays().items():
        np.testing.assert_array_equal(value, second.arrays()[name])


def test_warm_scores_equal_cold_ones_and_say_what_they_save(home: Home, tiny_teacher: Path) -> None:
    (cold,), before = ask(home, tiny_teacher)
    (warm,), after = ask(home, tiny_teacher)
    assert (cold.cached, warm.cached) == (False, True)
    assert_equal(cold.scores, warm.scores)
    assert (before.hits, before.misses, after.hits, after.misses) == (0, 1, 1, 0)
    assert after.milliseconds_saved == warm.milliseconds == cold.milliseconds > 0
    assert (after.entries, after.bytes) == (1, home.entries()[0].stat().st_size)


def test_what_was_just_computed_is_found_at_once(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        await score_all(service, [REQUEST])
        assert (await score_all(service, [REQUEST, REQUEST]))[1].cached

    home.run(work, tiny_teacher)


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, score_from=5, candidate_ids=np.ones((15, 3), np.int32)),
        replace(REQUEST, candidate_ids=np.zeros((16, 3), np.int32)),
        replace(REQUEST, candidate_ids=None),
        replace(REQUEST, masked_token_ids=(3,)),
        replace(REQUEST, wants=ScoreWants(top_k=9)),
        replace(REQUEST, token_ids=random_ids(20, 1)),
    ],
)
def test_any_other_request_is_a_miss(home: Home, tiny_teacher: Path, other: ScoreRequest) -> None:
    async def work(service: TeacherService) -> None:
        await score_all(service, [REQUEST])
        assert not (await score_all(service, [other]))[0].cached

    home.run(work, tiny_teacher)


def test_another_teacher_never_finds_the_entry(home: Home, tiny_teacher: Path, tiny_student: Path) -> None:
    ask(home, tiny_teacher)
    assert not ask(home, tiny_student)[0][0].cached


def test_the_cache_can_be_left_out(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        await score_all(service, [REQUEST], use_cache=False)
        assert service.cache_stats() == CacheStats(limit_bytes=1 << 24)

    home.run(work, tiny_teacher)
    assert not home.entries()


def flip_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def sealed(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).digest() + payload


def other_shape(_: bytes) -> bytes:
    return sealed(save({"top_ids": np.zeros((3, 8), np.int32)}, {"milliseconds": "1.0", "hidden_dtype": "float32"}))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped byte": flip_byte,
    "cut": lambda content: content[:-50],
    "empty": lambda _: b"",
    "other magic": lambda content: b"SOMETHIN" + content[8:],
    "no payload": lambda content: content[:HEADER_BYTES],
    "other shape": other_shape,
    "no safetensors": lambda _: sealed(b"hello, world, this is text"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_corrupt_entry_is_a_miss_with_a_warning_and_is_written_anew(
    home: Home, tiny_teacher: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    (cold,), _ = ask(home, tiny_teacher)
    (file,) = home.entries()
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        (again,), stats = ask(home, tiny_teacher)
    assert not again.cached
    assert_equal(cold.scores, again.scores)
    assert (stats.hits, stats.misses, stats.corrupt) == (0, 1, 1)
    assert "corrupt" in caplog.text
    assert ask(home, tiny_teacher)[0][0].cached


def test_an_entry_that_vanished_is_a_plain_miss(home: Home, tiny_teacher: Path) -> None:
    ask(home, tiny_teacher)

    async def work(service: TeacherService) -> None:
        home.entries()[0].unlink()
        assert not (await score_all(service, [REQUEST]))[0].cached
        assert service.cache_stats().corrupt == 0

    home.run(work, tiny_teacher)


def test_the_least_recently_used_entries_go_first(home: Home, tiny_teacher: Path) -> None:
    requests = [ScoreRequest(random_ids(20, seed), 1, ScoreWants(top_k=8)) for seed in range(4)]
    ask(home, tiny_teacher, *requests[:3])
    for age, request in enumerate(requests[:3]):
        os.utime(entry_of(home, tiny_teacher, request), (1000 + age, 1000 + age))
    ask(home, tiny_teacher, requests[0])
    size = home.entries()[0].stat().st_size
    _, stats = ask(home, tiny_teacher, requests[3], cache_limit_bytes=3 * size + size // 2)
    assert stats.evicted <= 1
    kept = [request for request in requests if ask(home, tiny_teacher, request)[0][0].cached]
    assert kept == [requests[0], requests[2], requests[3]]


def entry_of(home: Home, model: Path, request: ScoreRequest) -> Path:
    before = {file: file.stat().st_atime_ns for file in home.entries()}
    for file in before:
        os.utime(file, ns=(0, file.stat().st_mtime_ns))
    ask(home, model, request)
    (found,) = [file for file in home.entries() if file.stat().st_atime_ns != 0]
    return found


def test_pruning_empties_the_cache(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        await score_all(service, [REQUEST])
        stats = await service.prune_cache(None)
        assert stats.limit_bytes == 1 << 24
        assert (stats.entries, stats.evicted) == (1, 0)
        stats = await service.prune_cache(0)
        assert (stats.entries, stats.bytes, stats.evicted) == (0, 0, 1)

    home.run(work, tiny_teacher)
    assert not home.entries()


def test_files_left_by_a_crash_are_removed(home: Home, tiny_teacher: Path) -> None:
    ask(home, tiny_teacher)
    left = home.entries()[0].with_suffix(".123.tmp")
    left.write_bytes(b"half")
    assert ask(home, tiny_teacher)[0][0].cached
    assert not left.exists()


def test_a_full_disk_is_a_warning_and_the_call_succeeds(
    home: Home, tiny_teacher: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "opd_daemon"):
        patch.setattr("opd_daemon.teacher.cache.os.fsync", refuse)
        (found,), _ = ask_twice(home, tiny_teacher)
    assert not found.cached
    assert caplog.text.count("teacher cache: cannot write (No space left on device)") == 1
    assert not home.entries()


def ask_twice(home: Home, model: Path) -> tuple[list[CachedScores], CacheStats]:
    async def work(service: TeacherService) -> tuple[list[CachedScores], CacheStats]:
        await score_all(service, [ScoreRequest(random_ids(9), 1)])
        return await score_all(service, [REQUEST]), service.cache_stats()

    return home.run(work, model)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 5, "top_logprobs": 3}])
def test_repeatable_completions_come_from_the_cache(home: Home, tiny_teacher: Path, settings: dict[str, float]) -> None:
    request = GenerateRequest((5, 6, 7), 8, **settings)

    async def work(service: TeacherService) -> list[object]:
        return (await generate_all(service, [request]))[0]

    cold, warm = home.run(work, tiny_teacher), home.run(work, tiny_teacher)
    assert [token.cached for token in cold + warm] == [False] * len(cold) + [True] * len(warm)
    for first, second in zip(cold, warm, strict=True):
        assert (first.token_id, first.finish_reason) == (second.token_id, second.finish_reason)
        assert first.logprob == pytest.approx(second.logprob, abs=1e-6)
        np.testing.assert_array_equal(first.top_ids, second.top_ids)


def test_a_random_completion_is_never_kept(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        await generate_all(service, [GenerateRequest((5, 6, 7), 3)])
        assert service.cache_stats().misses == 0

    home.run(work, tiny_teacher)
    assert not home.entries()


def test_a_corrupt_completion_is_generated_again(home: Home, tiny_teacher: Path) -> None:
    request = GenerateRequest((5, 6, 7), 8, temperature=0.0)

    async def work(service: TeacherService) -> tuple[list[int], bool]:
        tokens = (await generate_all(service, [request]))[0]
        return [token.token_id for token in tokens], tokens[0].cached

    cold, _ = home.run(work, tiny_teacher)
    (file,) = home.entries()
    file.write_bytes(flip_byte(file.read_bytes()))
    assert home.run(work, tiny_teacher) == (cold, False)
    assert home.run(work, tiny_teacher) == (cold, True)
