"""Micro-batches: which tokens have rows, what they weigh, and which sequences go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opd_daemon.distill.batches import Rows, pack, packed
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import TeacherTargets
from opd_daemon.distill.signals import SampledSignal
from tests.distill.reference import log_softmax, reduced

HIDDEN = 8


def rollout(asked: int, said: int, seed: int = 0, **more: Any) -> Rollout:
    ids = np.random.default_rng(seed).integers(0, 50, asked + said).tolist()
    return Rollout(Prompt(seed, "", tuple(ids[:asked])), tuple(ids[asked:]), stopped="stop", source="student", **more)


def states(each: Rollout) -> TeacherTargets:
    """Hidden states that tell which position of which rollout they belong to."""
    said = len(each.completion_ids)
    numbers = np.full((said, HIDDEN), each.prompt.index, np.float32)
    numbers[:, 0] = np.arange(said)
    return TeacherTargets(hidden=numbers)


def likely(each: Rollout, count: int = 4, temperature: float = 2.0) -> TeacherTargets:
    said = len(each.completion_ids)
    logprobs = log_softmax(np.random.default_rng(each.prompt.index).normal(size=(said, 50)))
    ids = np.argsort(-logprobs, -1)[:, :count].astype(np.int32)
    parts = reduced(logprobs, ids).astype(np.float32)
    own = np.array(each.completion_ids)[:, None]
    return TeacherTargets(
        ids=ids,
        logprobs=parts[:, :-1],
        tail=parts[:, -1],
        log_z=np.log(np.exp(logprobs / temperature).sum(-1)).astype(np.float32),
        top_ids=ids[:, 0],
        entropies=-(np.exp(logprobs) * logprobs).sum(-1).astype(np.float32),
        token_logprobs=np.take_along_axis(logprobs, own, -1)[:, 0].astype(np.float32),
    )


def shapes(lengths: list[tuple[int, int]], size: int, max_tokens: int = 0) -> list[tuple[int, int]]:
    made = [rollout(*pair, seed) for seed, pair in enumerate(lengths)]
    targets = [states(each) for each in made]
    batches = packed(
        made, targets, size=size, temperature=1.0, labels="completion", max_tokens=max_tokens, loss_mean="token"
    )
    return [(batch.tokens.shape[0], batch.tokens.shape[1]) for batch in batches]


def test_a_batch_has_at_most_so_many_sequences_of_like_length() -> None:
    assert shapes([(40, 40), (4, 4), (30, 30), (5, 5), (6, 6)], size=2) == [(2, 16), (2, 64), (1, 80)]


def test_a_batch_has_at_most_so_many_tokens_but_always_a_sequence() -> None:
    found = shapes([(10, 20)] * 7 + [(100, 101), (100, 100)], size=64, max_tokens=100)
    assert found == [(3, 32), (3, 32), (1, 32), (1, 208), (1, 208)]
    assert all(lines * width <= 100 or lines == 1 for lines, width in found)


def test_lengths_come_in_few_shapes() -> None:
    widths = {shapes([(2, length)], size=1)[0][1] for length in range(1, 4000)}
    assert len(widths) <= 8 * 6
    for length in range(1, 4000, 7):
        [(_, width)] = shapes([(2, length)], size=1)
        assert length + 1 <= width <= max(16 + length, 1.13 * (length + 1) + 1)


def test_only_trained_tokens_have_rows() -> None:
    trained = np.array([False, True, True, False, True, False, False])
    made = [rollout(3, 7, 1, trained=trained), rollout(2, 4, 2)]
    batch = pack(made, [states(each) for each in made], 1.0, "completion")
    width = batch.tokens.shape[1]
    assert np.array(batch.places).tolist() == [3, 4, 6, width + 1, width + 2, width + 3, width + 4]
    own = [np.array(made[0].completion_ids)[trained], made[1].completion_ids]
    assert np.array(batch.rows.labels).tolist() == np.concatenate(own).tolist()
    assert batch.rows.hidden is not None
    assert np.array(batch.rows.hidden.array())[:, :2].tolist() == [
        *([place, 1.0] for place in (1.0, 2.0, 4.0)),
        *([place, 2.0] for place in (0.0, 1.0, 2.0, 3.0)),
    ]
    assert np.array(batch.rows.mask).tolist() == [1.0] * 7
    assert batch.count == 7


def test_the_student_reads_no_further_than_the_last_trained_token_needs() -> None:
    trained = np.zeros(60, np.bool_)
    trained[:5] = True
    made = rollout(10, 60, trained=trained)
    target = states(made).at(np.arange(5))
    batch = pack([made], [target], 1.0, "completion")
    assert batch.tokens.shape == (1, 16)
    assert np.array(batch.tokens)[0, :14].tolist() == made.token_ids[:14].tolist()


def test_rollouts_without_a_trained_token_are_left_out() -> None:
    made = [rollout(3, 4, 1, trained=np.zeros(4, np.bool_)), rollout(3, 4, 2)]
    targets = [TeacherTargets(), states(made[1])]
    [batch] = packed(made, targets, size=8, temperature=1.0, labels="completion")
    assert batch.rollouts == (made[1],)
    assert list(packed(made[:1], targets[:1], size=8, temperature=1.0, labels="completion")) == []


def test_every_sequence_weighs_the_same_in_a_mean_over_sequences() -> None:
    made = [rollout(3, 8, 1), rollout(3, 2, 2), rollout(3, 4, 3, trained=np.array([True, False, False, False]))]
    batch = pack(made, [states(each) for each in made], 1.0, "completion", loss_mean="sequence")
    assert np.array(batch.rows.mask) == pytest.approx(np.array([1 / 8] * 8 + [1 / 2] * 2 + [1.0]))
    assert batch.count == 3


def test_targets_of_another_length_are_refused() -> None:
    made = rollout(3, 8)
    with pytest.raises(ValueError, match="7 teacher rows for 8"):
        pack([made], [states(rollout(3, 7))], 1.0, "completion")


def test_without_a_teacher_the_rows_have_labels_alone() -> None:
    batch = pack([rollout(3, 8)], [TeacherTargets()], 1.0, "completion")
    assert (batch.rows.signal, batch.rows.plain, batch.rows.hidden) == (None, None, None)
    assert not batch.rows.exact
    with pytest.raises(ValueError, match="without a teacher"):
        pack([rollout(3, 8)], [TeacherTargets()], 1.0, "teacher")


def test_sparse_signals_are_at_the_loss_temperature_and_what_is_watched_at_1() -> None:
    made = [rollout(3, 5, 1), rollout(4, 3, 2)]
    rows = pack(made, [likely(made[0], 4), likely(made[1], 6)], 2.0, "teacher").rows
    assert rows.plain_signal.ids.shape == (8, 6)
    for index, (each, cut) in enumerate(zip(made, (slice(5), slice(5, 8)), strict=True)):
        count = (4, 6)[index]
        logprobs = np.random.default_rng(each.prompt.index).normal(size=(len(each.completion_ids), 50))
        ids = np.array(rows.plain_signal.ids)[cut, :count]
        for signal, temperature in ((rows.plain_signal, 1.0), (rows.signal, 2.0)):
            assert signal is not None
            expected = reduced(log_softmax(logprobs, temperature), ids)
            assert np.array(signal.logprobs)[cut, :count] == pytest.approx(expected[:, :-1], abs=1e-5)  # type: ignore[union-attr]
            assert np.array(signal.tail)[cut] == pytest.approx(expected[:, -1], abs=1e-4)  # type: ignore[union-attr]
    assert (np.array(rows.labels) == np.array(rows.plain_signal.ids)[:, 0]).all()


def test_sampled_signals_bring_what_sampled_them_and_a_support() -> None:
    behaviour = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
    made = rollout(3, 4, 1, behaviour_logprobs=behaviour, trained=np.array([True, False, True, True]))
    signal = pack([made], [likely(made)], 2.0, "completion", sampled=True).rows.signal
    assert isinstance(signal, SampledSignal)
    assert np.array(signal.tokens).tolist() == [made.completion_ids[place] for place in (0, 2, 3)]
    assert np.array(signal.behaviour_logprobs).tolist() == [-1.0, -3.0, -4.0]
    tempered = log_softmax(np.random.default_rng(1).normal(size=(4, 50)), 2.0)
    own = np.take_along_axis(tempered, np.array(made.completion_ids)[:, None], -1)[:, 0]
    assert np.array(signal.teacher_logprobs) == pytest.approx(own[[0, 2, 3]], abs=1e-5)
    other = rollout(3, 4, 2)
    mixed = pack([made, other], [likely(made), likely(other)], 2.0, "completion", sampled=True).rows.signal
    assert isinstance(mixed, SampledSignal)
    assert mixed.behaviour_logprobs is None


def test_parts_of_rows_are_the_rows_and_stale_ones_weigh_nothing() -> None:
    made = [rollout(3, 5, 1), rollout(4, 6, 2)]
    mixed = [likely(made[0]), likely(made[1])]
    mixed[1] = TeacherTargets(
        **{name: getattr(mixed[1], name) for name in ("ids", "logprobs", "tail", "log_z", "top_ids", "entropies")},
        hidden=states(made[1]).hidden,
    )
    rows: Rows = pack(made, mixed, 2.0, "teacher").rows
    assert not rows.exact
    assert rows.hidden is not None
    assert rows.hidden.known.tolist() == [5, 6, 7, 8, 9, 10]
    part = rows.part(4, 9, fresh=6)
    assert part.hidden is not None
    assert np.array(part.mask).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert part.hidden.known.tolist() == [2, 3, 4]
    assert np.array(part.hidden.array())[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert (np.array(part.labels) == np.array(rows.labels)[4:9]).all()
