"""Who goes first at the teacher, and who is let in: a flood from one client never shuts out another."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_daemon.errors import RETRY_AFTER, OpdError, Reason
from opd_daemon.teacher import engine as engine_module
from opd_daemon.teacher import fair_queue
from opd_daemon.teacher.batching import Budget, GenerationItem, Places, ScoreItem, joining, next_batch
from opd_daemon.teacher.engine import SHARES, Engine
from opd_daemon.teacher.fair_queue import FairQueue, Item
from opd_daemon.teacher.pace import LONGEST_SECONDS, SHORTEST_SECONDS, Pace
from opd_daemon.types import GenerateRequest, ScoreRequest

BUDGET = Budget(alone=800, contended=200, small=400)
PLACES = Places(most=8, alone=6, contended=3, prefilled=8, prefilled_of_one=8, contended_tokens=20)


def nowhere(*_: Any) -> None:
    """Takes what nobody reads."""


def score_item(client: str, tokens: int = 100, together: object = None) -> ScoreItem:
    return ScoreItem(ScoreRequest(np.arange(tokens, dtype=np.int32), 1), client, nowhere, None, together)


def prompt_item(client: str, tokens: int = 2) -> GenerationItem:
    return GenerationItem(GenerateRequest((1,) * tokens, max_tokens=8), client, nowhere)


def queue_of(*items: Item) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue()
    for item in items:
        queue.add(item)
    return queue


def clients_of(items: Sequence[ScoreItem] | Sequence[GenerationItem]) -> list[str]:
    return [item.client for item in items]


def test_one_client_alone_gets_whole_passes() -> None:
    queue = queue_of(*(score_item("flood") for _ in range(50)))
    assert len(next_batch(queue, BUDGET, shares=False)) == 8


def test_a_flood_gets_short_passes_while_another_client_waits_or_may_come_back() -> None:
    small = score_item("small")
    queue = queue_of(small, *(score_item("flood") for _ in range(50)))
    queue.discard(small)
    assert clients_of(next_batch(queue, BUDGET, shares=False)) == ["flood", "flood"]


def test_a_client_that_has_not_come_for_a_while_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small = score_item("small")
    queue = queue_of(small, *(score_item("flood") for _ in range(50)))
    queue.discard(small)
    now = fair_queue.time.monotonic()
    monkeypatch.setattr(fair_queue.time, "monotonic", lambda: now + 2 * fair_queue.LATELY_SECONDS)
    assert len(next_batch(queue, BUDGET, shares=False)) == 8


def test_a_flood_does_not_ride_along_with_a_small_call() -> None:
    queue = queue_of(score_item("small"), *(score_item("flood") for _ in range(50)))
    assert clients_of(next_batch(queue, BUDGET, shares=False)) == ["small"]


def test_a_small_call_is_done_in_one_pass() -> None:
    queue = queue_of(*(score_item("small") for _ in range(4)), *(score_item("flood") for _ in range(50)))
    assert clients_of(next_batch(queue, BUDGET, shares=False)) == ["small"] * 4


def test_small_clients_ride_along_with_each_other_and_with_a_flood() -> None:
    queue = queue_of(*(score_item("flood", 20) for _ in range(50)), *(score_item(f"small{n}", 20) for n in range(4)))
    batch = next_batch(queue, BUDGET, shares=False)
    assert sorted(set(clients_of(batch))) == ["flood", "small0", "small1", "small2", "small3"]
    queue.take([item for item in batch if item.client == "flood"])
    assert set(clients_of(next_batch(queue, BUDGET, shares=False))) == {"small0", "small1", "small2", "small3"}


def test_what_a_run_has_computed_apart_comes_in_the_same_passes_whoever_waits() -> None:
    call = object()
    items = [score_item("run", together=call) for _ in range(10)]
    alone = next_batch(queue_of(*items), BUDGET, shares=False)
    assert next_batch(queue_of(*items, score_item("small")), BUDGET, shares=False) == alone == items[:8]


def test_clients_take_turns_pass_by_pass() -> None:
    queue = queue_of(*(score_item("flood") for _ in range(6)), *(score_item("other") for _ in range(6)))
    turns = []
    while queue:
        batch = next_batch(queue, BUDGET, shares=False)
        queue.take(batch)
        turns.append(batch[0].client)
    assert turns[:4] == ["flood", "other"] * 2


def test_who_comes_during_a_pass_goes_before_the_one_it_is_for() -> None:
    queue = queue_of(*(score_item("flood") for _ in range(50)))
    for _ in range(3):
        queue.take(next_batch(queue, BUDGET, shares=False))
        queue.add(score_item("small"))
        batch = next_batch(queue, BUDGET, shares=False)
        assert clients_of(batch) == ["small"]
        queue.take(batch)


def test_who_keeps_coming_back_does_not_pass_those_who_wait() -> None:
    queue = queue_of(*(score_item(client) for client in ("a", "b", "c") for _ in range(20)))
    turns = []
    for _ in range(8):
        batch = next_batch(queue, BUDGET, shares=False)
        queue.take(batch)
        turns.append(batch[0].client)
        if not queue.tokens_of("eager"):
            queue.add(score_item("eager", 300))
    assert turns == ["a", "b", "c", "eager"] * 2


@given(st.lists(st.sampled_from(["pass", "a", "b", "c", "d"]), max_size=60))
def test_nobody_goes_twice_while_another_waits(steps: list[str]) -> None:
    queue: FairQueue[ScoreItem] = FairQueue()
    passed_by: dict[str, set[str]] = {}
    for step in steps:
        if step != "pass":
            passed_by.setdefault(step, set())
            queue.add(score_item(step))
        elif due := list(islice(queue.in_turn(), 1)):
            queue.take(due)
            served = due[0].client
            for client in passed_by.keys() - {served}:
                assert served not in passed_by[client]
                passed_by[client].add(served)
            passed_by[served] = set()
            if not queue.tokens_of(served):
                del passed_by[served]


def test_many_prompts_of_one_client_leave_room_for_another() -> None:
    queue = queue_of(*(prompt_item("flood") for _ in range(9)))
    decoding = joining(queue, [], [], PLACES, contended=False)
    assert clients_of(decoding) == ["flood"] * 6
    queue.take(decoding)
    queue.add(prompt_item("small"))
    assert clients_of(joining(queue, decoding, [], PLACES, contended=True)) == ["small"]


def test_a_flood_decodes_few_beside_another_client() -> None:
    queue = queue_of(*(prompt_item("flood") for _ in range(9)))
    assert clients_of(joining(queue, [prompt_item("small")], [], PLACES, contended=True)) == ["flood"] * 3
    decoding = [prompt_item("flood"), prompt_item("flood"), prompt_item("small")]
    assert clients_of(joining(queue, decoding, [], PLACES, contended=True)) == ["flood"]


def test_prompts_join_as_fast_as_they_are_computed_so_that_a_newcomer_is_next() -> None:
    places = Places(most=99, alone=99, contended=99, prefilled=4, prefilled_of_one=3, contended_tokens=99)
    queue = queue_of(*(prompt_item("flood") for _ in range(9)))
    prefilling = joining(queue, [], [], places, contended=False)
    assert len(prefilling) == 3
    queue.take(prefilling)
    assert not joining(queue, prefilling, prefilling, places, contended=False)
    queue.add(prompt_item("small"))
    assert clients_of(joining(queue, prefilling, prefilling, places, contended=True)) == ["small"]


def test_long_prompts_of_a_flood_come_one_by_one_beside_another_client() -> None:
    queue = queue_of(*(prompt_item("flood", 50) for _ in range(4)))
    assert len(joining(queue, [], [], PLACES, contended=False)) == 4
    queue.add(prompt_item("small", 50))
    first = joining(queue, [], [], PLACES, contended=True)
    assert sorted(clients_of(first)) == ["flood", "small"]
    queue.take(first)
    assert not joining(queue, first, first, PLACES, contended=True)
    assert clients_of(joining(queue, first, [], PLACES, contended=True)) == ["flood"]


def test_no_more_prompts_join_than_there_is_room_for() -> None:
    queue = queue_of(*(prompt_item(f"client{number % 4}") for number in range(20)))
    assert len(joining(queue, [prompt_item("old")], [], PLACES, contended=True)) == 7


class TestLongSequences:
    """An engine whose passes take a piece for each 512 tokens, done by hand."""

    @pytest.fixture
    def done(self) -> list[str]:
        """The client of every piece, in order."""
        return []

    @pytest.fixture
    def engine(self, done: list[str], monkeypatch: pytest.MonkeyPatch) -> Engine:
        def score_batch(_: object, requests: Sequence[ScoreRequest], piece: int) -> Generator[None, None, list[object]]:
            for _ in range(0, max(len(request.token_ids) for request in requests), piece):
                done.append("flood" if len(requests[0].token_ids) > piece else "small")
                yield
            return [None for _ in requests]

        monkeypatch.setattr(engine_module, "score_batch", score_batch)
        engine = Engine(token_budget=2048, piece=512, max_queue_tokens=1 << 20)
        engine._digest, engine._loaded = "digest", Mock(shares_prefixes=False)  # as if a model were loaded
        return engine

    def work(self, engine: Engine, pieces: int) -> None:
        for _ in range(pieces):
            work = engine._next_work()
            assert work
            work()

    @pytest.mark.parametrize("together", [None, "a run's call"])
    def test_let_a_small_call_go_between_their_pieces(
        self, engine: Engine, done: list[str], together: str | None
    ) -> None:
        engine.score("digest", [score_item("flood", 4 * 512, together)])
        self.work(engine, 1)
        engine.score("digest", [score_item("small")])
        self.work(engine, 1)
        engine.score("digest", [score_item("small")])
        self.work(engine, 7)
        assert done == ["flood", "small", "flood", "small", "flood", "flood"]

    def test_are_not_held_up_by_others_of_their_kind(self, engine: Engine, done: list[str]) -> None:
        engine.score("digest", [score_item("flood", 4 * 512)])
        self.work(engine, 1)
        engine.score("digest", [score_item("another flood", 3 * 512)])
        self.work(engine, 4)
        assert len(engine._batches) == 0
        assert engine.queued_tokens == 3 * 512


class TestAFullQueue:
    LIMIT = 1000 * SHARES

    @pytest.fixture
    def engine(self) -> Engine:
        """One whose thread isn't started, so that everything waits, filled by one client."""
        engine = Engine(token_budget=2048, piece=512, max_queue_tokens=self.LIMIT)
        engine._digest = "digest"  # as if a model were loaded
        engine.score("digest", [score_item("flood", self.LIMIT)])
        return engine

    def test_refuses_who_filled_it_and_says_when_to_come_back(self, engine: Engine) -> None:
        with pytest.raises(OpdError) as caught:
            engine.score("digest", [score_item("flood", 500)])
        assert caught.value.reason is Reason.QUEUE_FULL
        assert int(caught.value.metadata[RETRY_AFTER]) >= 1000 * SHORTEST_SECONDS
        assert engine.queued_tokens == self.LIMIT

    def test_lets_in_a_client_that_has_little_there(self, engine: Engine) -> None:
        engine.score("digest", [score_item("small", 600)])
        engine.generate("digest", [prompt_item("small")])
        with pytest.raises(OpdError, match="try again"):
            engine.score("digest", [score_item("small", 600)])

    def test_lets_in_one_large_call_of_a_client_that_has_nothing_there(self, engine: Engine) -> None:
        engine.score("digest", [score_item("other", 700), score_item("other", 700)])
        with pytest.raises(OpdError, match="try again"):
            engine.score("digest", [score_item("other", 1)])

    def test_of_one_enormous_call_shuts_nobody_out(self) -> None:
        engine = Engine(token_budget=2048, piece=512, max_queue_tokens=self.LIMIT)
        engine._digest = "digest"
        engine.score("digest", [score_item("flood", 10 * self.LIMIT)])
        engine.score("digest", [score_item("small", 600)])

    def test_holds_no_more_than_everybodys_shares(self, engine: Engine) -> None:
        for number in range(SHARES - 1):
            engine.score("digest", [score_item(f"client{number}", 1000)])
        with pytest.raises(OpdError, match="try again"):
            engine.score("digest", [score_item("one more", 1000)])

    def test_forgets_what_was_cancelled(self, engine: Engine) -> None:
        item = score_item("small", 1000)
        engine.score("digest", [item])
        engine.cancel([item])
        engine.score("digest", [score_item("small", 1000)])


def test_the_wait_follows_from_the_measured_pace() -> None:
    pace = Pace()
    for _ in range(60):
        pace.measured(1000, 0.5)
    assert pace.seconds(4000) == pytest.approx(2.0, rel=0.01)
    assert pace.seconds(1) == SHORTEST_SECONDS
    assert pace.seconds(10**9) == LONGEST_SECONDS
