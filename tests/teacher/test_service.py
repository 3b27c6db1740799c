"""The service under many callers: bad input, cancellation, fairness, limits, and failures that stay where they are."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import TeacherService, engine
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants
from tests.teacher.resident import Home, generate_all, load_model, random_ids, score_all

IDS = random_ids(10)
BAD_SCORES: dict[str, tuple[ScoreRequest, str]] = {
    "empty": (ScoreRequest(IDS[:0], 1), "sequences[1].tokens.token_ids"),
    "one token": (ScoreRequest(IDS[:1], 1), "sequences[1].tokens.token_ids"),
    "too long": (ScoreRequest(random_ids(513), 1), "sequences[1].tokens.token_ids"),
    "negative id": (ScoreRequest(np.array([1, -1], np.int32), 1), "sequences[1].tokens.token_ids"),
    "id of no token": (ScoreRequest(np.array([1, 403], np.int32), 1), "sequences[1].tokens.token_ids"),
    "score_from 0": (ScoreRequest(IDS, 0), "sequences[1].score_from"),
    "score_from behind": (ScoreRequest(IDS, 10), "sequences[1].score_from"),
    "candidate rows": (ScoreRequest(IDS, 1, candidate_ids=np.zeros((3, 2), np.int32)), "sequences[1].candidate_ids"),
    "candidate id": (ScoreRequest(IDS, 9, candidate_ids=np.array([[403]], np.int32)), "sequences[1].candidate_ids"),
    "top_k negative": (ScoreRequest(IDS, 1, ScoreWants(top_k=-1)), "outputs.top_k"),
    "top_k too large": (ScoreRequest(IDS, 1, ScoreWants(top_k=404)), "outputs.top_k"),
    "temperature NaN": (ScoreRequest(IDS, 1, ScoreWants(log_z_temperatures=(math.nan,))), "outputs.log_z_temperatures"),
    "temperature 0": (ScoreRequest(IDS, 1, ScoreWants(log_z_temperatures=(0.0,))), "outputs.log_z_temperatures"),
    "nothing wanted": (ScoreRequest(IDS, 1, ScoreWants(token_stats=False)), "outputs"),
    "masked id": (ScoreRequest(IDS, 1, masked_token_ids=(403,)), "masked_token_ids"),
    "all masked": (ScoreRequest(IDS, 1, masked_token_ids=tuple(range(403))), "masked_token_ids"),
}
BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"prompt_ids": ()}, "prompts[0].tokens.token_ids"),
    "id of no token": ({"prompt_ids": (403,)}, "prompts[0].tokens.token_ids"),
    "no tokens": ({"max_tokens": 0}, "prompts[0].max_tokens"),
    "too many tokens": ({"max_tokens": 512}, "prompts[0].max_tokens"),
    "temperature NaN": ({"temperature": math.nan}, "prompts[0].temperature"),
    "temperature negative": ({"temperature": -1.0}, "prompts[0].temperature"),
    "top_p 0": ({"top_p": 0.0}, "prompts[0].top_p"),
    "top_logprobs": ({"top_logprobs": 404}, "prompts[0].top_logprobs"),
    "seed": ({"seed": -1}, "prompts[0].seed"),
    "stop id": ({"stop_token_ids": (-3,)}, "prompts[0].stop_token_ids"),
}


@pytest.mark.parametrize("fault", BAD_SCORES)
def test_bad_sequences_are_refused_by_field(home: Home, tiny_teacher: Path, fault: str) -> None:
    request, field = BAD_SCORES[fault]

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            service.score([ScoreRequest(IDS, 1), request])
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert [violation.field for violation in caught.value.violations] == [field]

    home.run(work, tiny_teacher)


def test_bad_prompts_are_refused_by_field(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        for changes, field in BAD_PROMPTS.values():
            good: dict[str, Any] = {"prompt_ids": (1, 2), "max_tokens": 3}
            with pytest.raises(OpdError) as caught:
                service.generate([GenerateRequest(**(good | changes))])
            assert [violation.field for violation in caught.value.violations] == [field]

    home.run(work, tiny_teacher)


def test_every_fault_is_named_at_once(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        wrong = ScoreRequest(np.array([1, 999], np.int32), 5, ScoreWants(top_k=500))
        with pytest.raises(OpdError) as caught:
            service.score([wrong, wrong])
        assert [violation.field for violation in caught.value.violations] == [
            "sequences[0].tokens.token_ids",
            "sequences[0].score_from",
            "outputs.top_k",
            "sequences[1].tokens.token_ids",
            "sequences[1].score_from",
        ]
        with pytest.raises(OpdError):
            service.score([])

    home.run(work, tiny_teacher)


def heavy(count: int, size: int = 400) -> list[ScoreRequest]:
    return [ScoreRequest(random_ids(size, seed), 1, ScoreWants(top_k=64)) for seed in range(count)]


def test_closing_the_iterator_frees_the_queue_and_the_work_in_progress(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        results = service.score(heavy(500), use_cache=False)
        await anext(results)
        assert service.queued_tokens > 0
        started = time.monotonic()
        await results.aclose()
        assert service.queued_tokens == 0
        await score_all(service, [ScoreRequest(IDS, 1)], use_cache=False)
        assert time.monotonic() - started < 5

    home.run(work, tiny_teacher, token_budget=500)


def test_cancelling_the_caller_frees_the_queue(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        caller = asyncio.ensure_future(score_all(service, heavy(500), use_cache=False))
        await asyncio.sleep(0.1)
        assert service.queued_tokens > 0
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert service.queued_tokens == 0

    home.run(work, tiny_teacher, token_budget=500)


def test_a_pass_whose_caller_left_is_given_up_between_two_pieces(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.score_batch
    begun, left = threading.Event(), threading.Event()

    def held(loaded: Any, requests: Any, piece: int) -> Any:
        """The first piece of the first pass takes until its caller has left."""
        pieces = real(loaded, requests, piece)
        next(pieces)
        begun.set()
        left.wait(30)
        yield
        return (yield from pieces)

    monkeypatch.setattr(engine, "score_batch", held)

    async def work(service: TeacherService) -> None:
        caller = asyncio.ensure_future(score_all(service, heavy(4), use_cache=False))
        assert await asyncio.to_thread(begun.wait, 30)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        left.set()
        # Of the same client, so its turn comes after a pass that has begun.
        await score_all(service, heavy(1), use_cache=False)
        assert (service.work.scored_sequences, service.work.scored_tokens) == (1, 400)

    home.run(work, tiny_teacher, piece=16, token_budget=2000)


def test_a_full_queue_refuses_the_whole_call(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        results = service.score(heavy(100), client="eager", use_cache=False)
        await anext(results)
        with pytest.raises(OpdError) as caught:
            await score_all(service, heavy(20), client="eager", use_cache=False)
        assert caught.value.reason is Reason.QUEUE_FULL
        await results.aclose()
        await score_all(service, heavy(1))

    home.run(work, tiny_teacher, token_budget=500, max_queue_tokens=10_000)


def test_a_small_caller_does_not_wait_for_a_large_one(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        large = service.score(heavy(500), client="large", use_cache=False)
        await anext(large)
        await score_all(service, heavy(2), client="small", use_cache=False)
        assert service.queued_tokens > 300 * 400
        await large.aclose()

    home.run(work, tiny_teacher, token_budget=500)


def test_work_past_its_deadline_is_dropped(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            await score_all(service, heavy(3), use_cache=False, deadline=time.monotonic() - 1)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert service.queued_tokens == 0

    home.run(work, tiny_teacher)


def test_scoring_goes_on_while_text_is_generated(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        prompts = [GenerateRequest((1, 2, 3), 300, temperature=0.0) for _ in range(4)]
        tokens = service.generate(prompts, client="writer", use_cache=False)
        await anext(tokens)
        await score_all(service, heavy(3), client="scorer", use_cache=False)
        assert sum([1 async for _ in tokens]) > 0

    home.run(work, tiny_teacher, token_budget=500)


def test_one_failing_sequence_fails_alone(home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.score_batch

    def failing(loaded: Any, requests: Any, piece: int) -> Any:
        if any(len(request.token_ids) == 13 for request in requests):
            raise RuntimeError("[malloc] Unable to allocate 99 bytes")
        return (yield from real(loaded, requests, piece))

    monkeypatch.setattr(engine, "score_batch", failing)

    async def work(service: TeacherService) -> None:
        good = asyncio.ensure_future(score_all(service, [ScoreRequest(IDS, 1)], client="good", use_cache=False))
        with pytest.raises(OpdError) as caught:
            await score_all(service, [ScoreRequest(random_ids(13), 1)], client="bad", use_cache=False)
        assert caught.value.reason is Reason.OUT_OF_MEMORY
        assert len(await good) == 1
        assert len(await score_all(service, [ScoreRequest(IDS, 1)], use_cache=False)) == 1

    home.run(work, tiny_teacher)


def test_a_failing_step_of_generation_leaves_the_engine_working(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(service: TeacherService) -> None:
        prompt = GenerateRequest((1, 2), 4, temperature=0.0)
        with monkeypatch.context() as patch:
            patch.setattr("opd_daemon.teacher.generation.describe", lambda *_: 1 / 0)
            with pytest.raises(OpdError) as caught:
                await generate_all(service, [prompt], use_cache=False)
        assert caught.value.reason is Reason.INTERNAL
        assert "Traceback" not in str(caught.value)
        assert len((await generate_all(service, [prompt], use_cache=False))[0]) == 4

    home.run(work, tiny_teacher)


def test_closing_fails_what_waits(home: Home, tiny_teacher: Path) -> None:
    async def main() -> None:
        async with home.teacher(tiny_teacher, token_budget=500) as service:
            waiting = asyncio.ensure_future(score_all(service, heavy(300), use_cache=False))
            writing = asyncio.ensure_future(generate_all(service, [GenerateRequest((1,), 400, 0.0)], use_cache=False))
            await asyncio.sleep(0.05)
        for call in (waiting, writing):
            with pytest.raises(OpdError) as caught:
                await call
            assert caught.value.reason is Reason.SHUTTING_DOWN

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_call_never_reaches_a_teacher_it_was_not_meant_for(
    home: Home, tiny_teacher: Path, tiny_student: Path
) -> None:
    async def work(service: TeacherService) -> None:
        results = service.score([ScoreRequest(IDS, 1)])
        await load_model(service, tiny_student)
        with pytest.raises(OpdError) as caught:
            await anext(results)
        assert caught.value.reason is Reason.TEACHER_CHANGED

    home.run(work, tiny_teacher)
    assert not home.entries()


def test_a_daemon_whose_teacher_thread_dies_leaves_to_be_started_again() -> None:
    script = """
from opd_daemon.teacher.engine import Engine
engine = Engine(token_budget=1, piece=1, max_queue_tokens=1)
def die():
    raise SystemExit
engine._next_work = lambda: die
engine.start()
engine._thread.join()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == os.EX_SOFTWARE, ended.stderr
    assert "the teacher's thread died" in ended.stderr
