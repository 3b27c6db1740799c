"""Calls to the teacher that are given up, never read, too late or too many: their place is free again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from opd_daemon.errors import Reason
from opd_daemon.types import ScoreRequest, ScoreWants
from opd_daemon.v1 import teacher_pb2 as pb
from opd_daemon.wire.arrays import pack
from opd_daemon.wire.errors import from_rpc_error
from tests.bad_inputs.stage import CONTEXT, VOCABULARY, Stage, closing_call, raised, refusal

WITHIN = 250.0  # MB that memory may grow by while nobody reads
QUEUE_TOKENS = 1 << 20


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with raised(tmp_path_factory.mktemp("teacher")) as built:
        yield built


def sequences(count: int, seed: int = 1, tokens: int = CONTEXT) -> list[pb.ScoredSequence]:
    """Different sequences of so many tokens each."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (count, tokens))
    return [pb.ScoredSequence(tokens=pb.TokenInput(token_ids=pb.TokenIds(ids=pack(row)))) for row in ids]


def scoring(count: int, *, top_k: int = 1, seed: int = 1) -> pb.ComputeLogprobsRequest:
    outputs = pb.LogprobOutputs(top_k=top_k)
    return pb.ComputeLogprobsRequest(sequences=sequences(count, seed), outputs=outputs, skip_cache=True)


def generating(count: int) -> pb.GenerateRequest:
    """Long greedy completions, which go into the cache when they are done."""
    prompts = [
        pb.GenerationPrompt(tokens=entry.tokens, max_tokens=400, temperature=0) for entry in sequences(count, tokens=8)
    ]
    return pb.GenerateRequest(prompts=prompts)


def seconds_of_a_short_call(stage: Stage) -> float:
    began = time.monotonic()
    stage.score(1, 2, 3)
    return time.monotonic() - began


def test_a_client_that_stops_reading_costs_no_memory(own: Stage) -> None:
    request = scoring(2000, top_k=VOCABULARY)  # 3 GB of scores
    seconds_of_a_short_call(own)
    before = own.megabytes()
    with closing_call(own.teacher.ComputeLogprobs(request)) as call:
        next(iter(call))
        for _ in range(20):
            time.sleep(0.25)
            assert own.megabytes() - before < WITHIN
        assert own.serves()
    assert seconds_of_a_short_call(own) < 10


def test_a_full_queue_refuses_with_a_time(own: Stage) -> None:
    with closing_call(own.teacher.ComputeLogprobs(scoring(QUEUE_TOKENS // CONTEXT))) as first:
        next(iter(first))
        error = refusal(lambda: list(own.teacher.ComputeLogprobs(scoring(QUEUE_TOKENS // CONTEXT, seed=2))))
        assert error.reason is Reason.QUEUE_FULL
        assert int(error.metadata["retry_after_milliseconds"]) > 0
    assert own.serves()


def test_who_cancels_frees_the_queue(own: Stage) -> None:
    for _ in range(3):  # each would fill the queue by itself
        with closing_call(own.teacher.ComputeLogprobs(scoring(QUEUE_TOKENS // CONTEXT))) as call:
            next(iter(call))
    assert seconds_of_a_short_call(own) < 10
    list(own.teacher.ComputeLogprobs(scoring(4)))


def test_who_cancels_a_completion_ends_it(own: Stage) -> None:
    before = own.client.cache_stats().entries
    with closing_call(own.teacher.Generate(generating(16))) as call:
        for _ in range(3):
            next(call)
    assert seconds_of_a_short_call(own) < 10
    time.sleep(1)
    assert own.client.cache_stats().entries <= before + 1  # that of the short call


def test_a_deadline_that_is_past_computes_nothing(own: Stage) -> None:
    request = pb.ComputeLogprobsRequest(sequences=sequences(64, seed=9), outputs=pb.LogprobOutputs(token_stats=True))
    before = own.client.cache_stats().entries
    with closing_call(own.teacher.ComputeLogprobs(scoring(1000))) as busy:
        next(iter(busy))
        with pytest.raises(grpc.RpcError) as caught:
            list(own.teacher.ComputeLogprobs(request, timeout=0.05))
    assert from_rpc_error(caught.value).reason is Reason.DEADLINE_EXCEEDED
    assert seconds_of_a_short_call(own) < 10
    assert own.client.cache_stats().entries <= before + 8  # what one pass may have held already


def test_the_same_request_gets_the_same_answer_alone_and_beside_others(own: Stage) -> None:
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (9, 64)).astype(np.int32)
    requests = [ScoreRequest(row, 1, ScoreWants(token_stats=True)) for row in ids]
    [alone] = own.client.score(requests[:1], use_cache=False)
    [again] = own.client.score(requests[:1], use_cache=False)
    beside = own.client.score(requests, use_cache=False)[0]
    assert alone.scores.token_logprobs is not None
    for other in (again, beside):
        np.testing.assert_allclose(other.scores.token_logprobs, alone.scores.token_logprobs, atol=1e-4)


def test_a_short_text_does_not_wait_for_long_ones(own: Stage) -> None:
    long = pb.TokenizeRequest(tokens=pb.TokenInput(text="ab" * (1 << 18)))
    given_up = [own.teacher.Tokenize.future(long) for _ in range(20)]
    kept = own.teacher.Tokenize.future(long)
    own.teacher.Tokenize(pb.TokenizeRequest(tokens=pb.TokenInput(text="ab")))
    assert not kept.done()
    for call in given_up:
        call.cancel()
    assert len(kept.result(timeout=60).token_ids.ids)
