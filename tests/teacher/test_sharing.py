"""A prompt that several sequences share is computed once, and the answers are those of computing it each time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ChunkedKVCache

from opd_daemon.models.host_decoder import decoder_of
from opd_daemon.models.split import split
from opd_daemon.teacher import TeacherService
from opd_daemon.teacher.batching import Budget, ScoreItem, next_batch
from opd_daemon.teacher.fair_queue import FairQueue
from opd_daemon.teacher.folder import open_folder
from opd_daemon.teacher.loading import LoadedModel, load
from opd_daemon.teacher.scoring import score_batch
from opd_daemon.teacher.sharing import can_share, common_prefix, shared_prefix
from opd_daemon.types import ScoreRequest, Scores, ScoreWants
from tests.families import VOCAB, tiny_family
from tests.teacher.resident import Home, random_ids, score_all

EVERYTHING = ScoreWants(token_stats=True, top_k=5, log_z_temperatures=(2.0,), hidden=True)


def sample(prompt: np.ndarray, size: int, seed: int, *, score_from: int = 0, vocab: int = VOCAB) -> ScoreRequest:
    ids = np.concatenate([prompt, random_ids(size, seed, vocab)])
    start = score_from or len(prompt)
    candidates = random_ids((len(ids) - start) * 3, seed + 1, vocab).reshape(-1, 3)
    return ScoreRequest(ids, start, EVERYTHING, candidates)


def family(name: str) -> LoadedModel:
    model = tiny_family(name)
    parts = split(model, VOCAB)
    return LoadedModel(model, parts, VOCAB, 0, can_share(model, parts, VOCAB), decoder_of(model, parts))


@dataclass
class Forwards:
    """Shapes of the token matrices the model was given."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


@contextmanager
def counted(loaded: LoadedModel) -> Iterator[tuple[LoadedModel, Forwards]]:
    forwards = Forwards()

    def body(tokens: mx.array, cache: Any = None) -> mx.array:
        forwards.shapes.append(tokens.shape)
        return loaded.parts.body(tokens, cache)

    yield replace(loaded, parts=replace(loaded.parts, body=body)), forwards


def scored(loaded: LoadedModel, requests: Sequence[ScoreRequest], piece: int = 512) -> list[Scores]:
    work = score_batch(loaded, requests, piece)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def assert_same(shared: Sequence[Scores], plain: Sequence[Scores]) -> None:
    for first, second in zip(shared, plain, strict=True):
        assert first.arrays().keys() == second.arrays().keys()
        for name, value in second.arrays().items():
            np.testing.assert_allclose(first.arrays()[name], value, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("piece", [512, 7, 1])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "lfm2"])
def test_shared_prompts_give_the_same_answers(name: str, piece: int) -> None:
    loaded = family(name)
    assert loaded.shares_prefixes
    prompt = random_ids(30, 5, VOCAB)
    requests = [sample(prompt, size, size) for size in (9, 8, 1, 20, 9)]
    requests += [sample(prompt, 6, 3, score_from=4), sample(prompt, 7, 4, score_from=1)]
    with counted(loaded) as (watched, forwards):
        shared = scored(watched, requests, piece)
    plain = scored(replace(loaded, shares_prefixes=False), requests, piece)
    assert_same(shared, plain)
    assert forwards.shapes[0] == (1, min(piece, 30))
    assert forwards.tokens < 0.5 * len(requests) * 49


def test_equal_sequences_are_computed_once() -> None:
    loaded = family("llama")
    request = sample(random_ids(20, 1, VOCAB), 5, 2)
    with counted(loaded) as (watched, forwards):
        shared = scored(watched, [request, request, request])
    assert forwards.shapes == [(1, 24)]
    assert_same(shared, scored(replace(loaded, shares_prefixes=False), [request] * 3))


def test_a_beginning_too_short_to_pay_is_not_shared() -> None:
    loaded = family("llama")
    requests = [sample(np.array([7, 8], np.int32), 30, seed) for seed in range(4)]
    with counted(loaded) as (watched, forwards):
        scored(watched, requests)
    assert forwards.shapes == [(4, 31)]
    assert shared_prefix([request.token_ids for request in requests]) == 0


def test_padding_between_unlike_completions_stays_small() -> None:
    loaded = family("llama")
    prompt = random_ids(40, 1, VOCAB)
    requests = [sample(prompt, size, size) for size in (80, 79, 2, 1, 3, 2, 2)]
    with counted(loaded) as (watched, forwards):
        scored(watched, requests)
    # The last token of a sequence is not computed.
    assert forwards.shapes[:2] == [(1, 39 + 1), (2, 79)]
    assert forwards.tokens < 40 + 2 * 79 + 5 * 2 + 32


def test_a_model_whose_head_is_part_of_its_body_shares_as_well(tiny_teacher: Path) -> None:
    model = tiny_family("qwen2")
    parts = split(lambda tokens, cache=None: model(tokens, cache=cache), VOCAB)
    assert parts.refusal
    loaded = LoadedModel(model, parts, VOCAB, 0, can_share(model, parts, VOCAB), decoder_of(model, parts))
    prompt = random_ids(30, 5, VOCAB)
    requests = [replace(sample(prompt, 6, seed), wants=replace(EVERYTHING, hidden=False)) for seed in range(4)]
    with counted(loaded) as (watched, forwards):
        shared = scored(watched, requests)
    assert forwards.tokens == 30 + 4 * 5
    assert_same(shared, scored(replace(loaded, shares_prefixes=False), requests))


def test_caches_of_unknown_kinds_are_not_shared() -> None:
    model = tiny_family("llama")
    model.make_cache = lambda: [ChunkedKVCache(8) for _ in model.layers]
    assert not can_share(model, split(model, VOCAB), VOCAB)


def test_a_cache_that_is_continued_wrongly_is_not_shared() -> None:
    loaded = family("llama")

    def forgetful(tokens: mx.array, cache: Any = None) -> mx.array:
        return loaded.parts.body(tokens, cache if len(tokens) == 1 else None)

    assert not can_share(loaded.model, replace(loaded.parts, body=forgetful), VOCAB)


def queue_of(requests: Sequence[ScoreRequest], clients: Sequence[str] = ()) -> tuple[FairQueue[ScoreItem], list]:
    queue: FairQueue[ScoreItem] = FairQueue()
    items = [
        ScoreItem(request, client, lambda *_: None)
        for request, client in zip(requests, clients or ["one"] * len(requests), strict=True)
    ]
    for item in items:
        queue.add(item)
    return queue, items


def test_samples_of_one_prompt_come_together_whatever_their_lengths() -> None:
    first, second = random_ids(100, 1), random_ids(100, 2)
    requests = [sample(prompt, size, size) for size in (10, 60, 200) for prompt in (first, second)]
    queue, items = queue_of(requests)
    assert next_batch(queue, Budget(2048, 2048, 2048), shares=True) == items[::2]
    queue.take(items[::2])
    assert next_batch(queue, Budget(2048, 2048, 2048), shares=True) == items[1::2]


def test_a_shared_prompt_does_not_count_towards_the_budget() -> None:
    prompt = random_ids(500, 1)
    queue, items = queue_of([sample(prompt, 20, seed) for seed in range(8)])
    assert next_batch(queue, Budget(100, 100, 100), shares=True) == items[:5]
    assert next_batch(queue, Budget(100, 100, 100), shares=False) == items[:1]


def test_the_due_item_goes_first_even_if_others_share_more() -> None:
    prompt = random_ids(100, 1)
    requests = [sample(random_ids(60, 9), 20, 1), *(sample(prompt, 20, seed) for seed in range(4))]
    queue, items = queue_of(requests, ["early", *["late"] * 4])
    batch = next_batch(queue, Budget(90, 90, 90), shares=True)
    assert batch == items[:1]
    queue.take(batch)
    assert next_batch(queue, Budget(90, 90, 90), shares=True) == items[1:]


def test_prompts_that_only_begin_alike_share_their_beginning() -> None:
    system = random_ids(80, 1)
    requests = [sample(np.concatenate([system, random_ids(8, 20 + seed)]), 10, seed) for seed in range(4)]
    queue, items = queue_of(requests)
    assert next_batch(queue, Budget(400, 400, 400), shares=True) == items
    assert common_prefix(requests[0].token_ids, requests[1].token_ids) == 80


def test_the_service_shares_the_prompts_of_one_call(home: Home, tiny_teacher: Path) -> None:
    prompts = [random_ids(100, 1), random_ids(70, 2)]
    requests = [
        sample(prompt, 10 + seed, seed, score_from=0 if seed else 50, vocab=400)
        for seed in range(4)
        for prompt in prompts
    ]

    async def work(service: TeacherService) -> list[Scores]:
        return [found.scores for found in await score_all(service, requests, use_cache=False)]

    alone = load(open_folder(str(tiny_teacher)), 403, lambda _: None)
    expected = [scored(alone, [request])[0] for request in requests]
    assert_same(home.run(work, tiny_teacher), expected)
    assert_same(home.run(work, tiny_teacher, piece=9, token_budget=40), expected)


def test_items_of_different_companies_never_meet_in_a_batch() -> None:
    requests = [sample(random_ids(30, 1), 20, seed) for seed in range(5)]
    queue, items = queue_of(requests)
    run = object()
    items[1].together = items[4].together = run
    assert next_batch(queue, Budget(2048, 2048, 2048), shares=False) == [items[0], *items[2:4]]
    queue.take([items[0], *items[2:4]])
    assert next_batch(queue, Budget(2048, 2048, 2048), shares=True) == [items[1], items[4]]


def test_a_call_apart_gets_the_same_bits_whoever_else_asks(home: Home, tiny_teacher: Path) -> None:
    mine = [sample(random_ids(21, 3), 12, seed, vocab=400) for seed in range(3)]
    others = [sample(random_ids(40, 4 + seed), 9, seed, vocab=400) for seed in range(40)]

    async def work(service: TeacherService) -> None:
        quiet = await score_all(service, mine, use_cache=False, apart=True)
        calls = [score_all(service, [request], use_cache=False, client=str(i)) for i, request in enumerate(others)]
        twins = [score_all(service, mine, use_cache=False, apart=True) for _ in range(2)]
        busy = (await asyncio.gather(*calls[:20], *twins, *calls[20:]))[20:22]
        for answers in busy:
            for alone, beside in zip(quiet, answers, strict=True):
                assert np.array_equal(alone.scores.hidden, beside.scores.hidden)

    home.run(work, tiny_teacher)


def test_two_clients_share_a_prompt(home: Home, tiny_teacher: Path) -> None:
    prompt = random_ids(100, 1)
    requests = [sample(prompt, 10, seed, vocab=400) for seed in range(2)]

    async def work(service: TeacherService) -> None:
        calls = [score_all(service, [request], client=str(index)) for index, request in enumerate(requests)]
        found = await asyncio.gather(*calls)
        assert all(len(results) == 1 for results in found)

    home.run(work, tiny_teacher)
