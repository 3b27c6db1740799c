"""Continuous batching: the tokens are those of mlx-lm alone, whatever else is being generated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from opd_daemon.teacher import TeacherService
from opd_daemon.teacher.generation import nucleus
from opd_daemon.types import GeneratedToken, GenerateRequest, ScoreRequest
from tests.teacher.resident import Home, generate_all, random_ids, reference, score_all
from tests.tiny import write_tiny_qwen2

PROMPTS = [tuple(int(index) for index in random_ids(size, size)) for size in (3, 17, 5, 40, 9, 2, 30, 11, 6, 21)]


def ids_of(tokens: list[GeneratedToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_greedy_equals_mlx_lm_with_prompts_of_all_lengths(home: Home, tmp_path: Path) -> None:
    folder = write_tiny_qwen2(tmp_path / "model", seed=1, vocab=403)
    requests = [GenerateRequest(prompt, 12, temperature=0.0) for prompt in PROMPTS]

    async def work(service: TeacherService) -> list[list[GeneratedToken]]:
        return await generate_all(service, requests)

    found = home.run(work, folder, piece=16)
    model, _ = load(str(folder))
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        plain = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
        assert ids_of(tokens) == until_stop(plain, {402, 400})


def until_stop(ids: list[int], stops: set[int]) -> list[int]:
    ends = [place for place, index in enumerate(ids) if index in stops]
    return ids[: ends[0] + 1] if ends else ids


def test_logprobs_are_those_of_scoring_whatever_the_temperature(home: Home, tiny_teacher: Path) -> None:
    requests = [GenerateRequest(prompt, 10, 0.7, top_p=0.9, seed=3, top_logprobs=4) for prompt in PROMPTS[:4]]

    async def work(service: TeacherService) -> None:
        for request, tokens in zip(requests, await generate_all(service, requests), strict=True):
            whole = np.array([*request.prompt_ids, *ids_of(tokens)], np.int32)
            (scored,) = await score_all(service, [ScoreRequest(whole, len(request.prompt_ids))])
            np.testing.assert_allclose([token.logprob for token in tokens], scored.scores.token_logprobs, atol=1e-3)
            exact = reference(tiny_teacher, whole)[len(request.prompt_ids) - 1 :]
            for token, row in zip(tokens, exact, strict=True):
                np.testing.assert_array_equal(token.top_ids, np.argsort(-row)[:4])
                np.testing.assert_allclose(token.top_logprobs, np.sort(row)[::-1][:4], atol=1e-3)

    home.run(work, tiny_teacher)


def test_a_seed_gives_the_same_tokens_alone_and_in_company(home: Home, tiny_teacher: Path) -> None:
    request = GenerateRequest(PROMPTS[1], 20, 1.0, seed=11)
    strangers = [GenerateRequest(prompt, 5 + place, 1.3, seed=place) for place, prompt in enumerate(PROMPTS)]

    async def work(service: TeacherService) -> None:
        (alone,) = await generate_all(service, [request], use_cache=False)
        crowd = await generate_all(service, [*strangers[:5], request, *strangers[5:], request], use_cache=False)
        assert ids_of(crowd[5]) == ids_of(crowd[-1]) == ids_of(alone)
        other = GenerateRequest(PROMPTS[1], 20, 1.0, seed=12)
        assert ids_of((await generate_all(service, [other]))[0]) != ids_of(alone)

    home.run(work, tiny_teacher)


def test_sampling_without_a_seed_varies(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        found = await generate_all(service, [GenerateRequest(PROMPTS[0], 20, 2.0)] * 3)
        assert len({tuple(ids_of(tokens)) for tokens in found}) > 1

    home.run(work, tiny_teacher)


def test_stop_tokens_and_length_end_a_completion_and_say_so(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        (free,) = await generate_all(service, [GenerateRequest(PROMPTS[2], 10, 0.0)])
        stop = free[4].token_id
        first = ids_of(free).index(stop)
        (stopped,) = await generate_all(service, [GenerateRequest(PROMPTS[2], 10, 0.0, stop_token_ids=(stop,))])
        assert ids_of(stopped) == ids_of(free)[: first + 1]
        assert [token.finish_reason for token in stopped] == [""] * first + ["stop"]
        assert [token.finish_reason for token in free] == [""] * 9 + ["length"]

    home.run(work, tiny_teacher)


def test_more_prompts_than_places_all_get_their_turn(home: Home, tiny_teacher: Path) -> None:
    requests = [GenerateRequest(PROMPTS[place % 10], 1 + place % 7, 0.0) for place in range(80)]

    async def work(service: TeacherService) -> None:
        found = await generate_all(service, requests, use_cache=False)
        for request, tokens in zip(requests, found, strict=True):
            assert len(tokens) == request.max_tokens or tokens[-1].finish_reason == "stop"
            assert max(ids_of(tokens)) < service.info.vocab_size

    home.run(work, tiny_teacher)


def test_a_caller_that_leaves_frees_its_place_and_others_go_on(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        leaving = service.generate([GenerateRequest(PROMPTS[3], 400, 0.0)] * 40, client="leaving", use_cache=False)
        await anext(leaving)
        staying = service.generate([GenerateRequest(PROMPTS[4], 30, 0.0)], client="staying", use_cache=False)
        first = await anext(staying)
        await leaving.aclose()
        rest = [token async for token in staying]
        assert service.queued_tokens == 0
        alone = (await generate_all(service, [GenerateRequest(PROMPTS[4], 30, 0.0)], use_cache=False))[0]
        assert ids_of([token for _, token in [first, *rest]]) == ids_of(alone)

    home.run(work, tiny_teacher)


def test_completions_whose_caller_left_are_computed_no_further(home: Home, tiny_teacher: Path) -> None:
    # Without their ends they go on for 400 tokens each.
    endless = [GenerateRequest(prompt, 400, 0.0, masked_token_ids=(400, 402)) for prompt in PROMPTS[:4]]

    async def work(service: TeacherService) -> None:
        leaving = service.generate(endless, use_cache=False)
        await anext(leaving)
        await leaving.aclose()
        computed = -1
        while computed != service.work.generated_tokens:
            computed = service.work.generated_tokens
            await asyncio.sleep(0.3)
        assert computed < 400

    home.run(work, tiny_teacher)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [1]), (0.75, [1, 3]), (0.95, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_the_nucleus_is_the_fewest_tokens_that_reach_the_mass(top_p: float, kept: list[int]) -> None:
    logits = mx.log(mx.array([[0.05, 0.55, 0.15, 0.25]]))
    found = np.array(nucleus(logits, top_p))[0]
    assert list(np.flatnonzero(np.isfinite(found))) == kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_ids_are_never_generated(home: Home, tiny_teacher: Path, temperature: float) -> None:
    plain = [GenerateRequest(prompt, 12, temperature, seed=1) for prompt in PROMPTS[:4]]

    async def work(service: TeacherService) -> None:
        masked = tuple(sorted({index for tokens in await generate_all(service, plain) for index in ids_of(tokens)}))
        asked = [GenerateRequest(prompt, 12, temperature, seed=1, masked_token_ids=masked) for prompt in PROMPTS[:4]]
        for tokens in await generate_all(service, asked):
            assert not {*ids_of(tokens)} & {*masked}

    home.run(work, tiny_teacher)
