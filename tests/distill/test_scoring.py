"""What the teacher is asked under each signal, and how its answers become targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask, cut_to_mass, measures_bias, trained_length, union
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import CachedScores, ScoreRequest
from tests.distill.local_teacher import LocalTeacher
from tests.distill.reference import log_softmax, reduced

PATHS = {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p", "top_k": 8}


def configured(**changes: Any) -> RunConfig:
    return parse_config({**PATHS, "exact_fraction": 0.0, **changes})


class Listening(LocalTeacher):
    """Keeps what it was asked."""

    asked: list[ScoreRequest]

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        self.asked = list(requests)
        return super().score(requests)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Listening:
    return Listening(tiny_teacher)


def rollout(seed: int = 0, said: int = 6, **more: Any) -> Rollout:
    ids = np.random.default_rng(seed).integers(0, 400, 4 + said).tolist()
    given: dict[str, Any] = {"stopped": "stop", "source": "student", **more}
    return Rollout(Prompt(seed, "", tuple(ids[:4])), tuple(ids[4:]), **given)


def support(rows: int = 6, count: int = 5) -> Any:
    generator = np.random.default_rng(1)
    return np.stack([generator.choice(400, count, replace=False) for _ in range(rows)]).astype(np.int32)


def test_signal_exact_asks_for_hidden_states_and_nothing_else(teacher: Listening) -> None:
    [target] = ask(teacher, [rollout(support_ids=support())], configured(), (5,))
    [request] = teacher.asked
    assert request.wants.hidden
    assert not request.wants.token_stats
    assert (request.wants.top_k, request.wants.log_z_temperatures, request.candidate_ids) == (0, (), None)
    assert request.masked_token_ids == (5,)
    assert target.hidden is not None
    assert target.hidden.shape == (6, 64)
    assert (target.ids, target.entropies, target.token_logprobs) == (None, None, None)


def test_a_teacher_without_hidden_states_is_refused_with_the_cure(tiny_teacher: Path) -> None:
    with pytest.raises(OpdError, match="set signal: sparse") as caught:
        ask(LocalTeacher(tiny_teacher, supports_hidden=False), [rollout()], configured())
    assert caught.value.reason is Reason.HIDDEN_NOT_SUPPORTED


@pytest.mark.parametrize("name", ["student", "teacher", "union"])
def test_the_support_is_whose_the_configuration_says(teacher: Listening, name: str) -> None:
    mine = support()
    [target] = ask(teacher, [rollout(support_ids=mine)], configured(signal="sparse", support=name))
    assert target.ids is not None
    assert target.logprobs is not None
    assert target.tail is not None
    whole = scores_of(teacher)
    likeliest = np.argsort(-whole, -1)[:, :8]
    for row, ids in enumerate(target.ids):
        kept = set(ids[ids >= 0].tolist())
        assert (
            kept
            == {
                "student": set(mine[row].tolist()),
                "teacher": set(likeliest[row].tolist()),
                "union": set(mine[row].tolist()) | set(likeliest[row].tolist()),
            }[name]
        )
        assert len(kept) == (ids >= 0).sum()
    expected = reduced(whole, target.ids)
    assert target.logprobs == pytest.approx(expected[:, :-1], abs=1e-5)
    assert target.tail == pytest.approx(expected[:, -1], abs=1e-4)


def scores_of(teacher: LocalTeacher) -> Any:
    """The teacher's logprobs at the rollout's completion tokens, in float64."""
    import mlx.core as mx

    tokens = mx.array(rollout().teacher_token_ids)[None]
    return log_softmax(np.array(teacher.model(tokens))[0, 3:-1, : teacher.info.vocab_size])


def test_without_recorded_ids_the_support_is_the_teachers(teacher: Listening) -> None:
    [target] = ask(teacher, [rollout()], configured(signal="sparse", support="student"))
    assert target.ids is not None
    assert target.ids.shape == (6, 8)
    assert teacher.asked[0].wants.top_k == 8


def test_a_union_names_every_id_once_and_takes_new_ones_out_of_the_tail() -> None:
    logprobs = log_softmax(np.random.default_rng(3).normal(size=(20, 50)) * 3)
    top_ids = np.argsort(-logprobs, -1)[:, :6].astype(np.int32)
    ids = np.stack([np.random.default_rng(row).choice(50, 9, replace=False) for row in range(20)]).astype(np.int32)
    ids[:, 8] = -1
    top, mine = reduced(logprobs, top_ids).astype(np.float32), reduced(logprobs, ids).astype(np.float32)
    joined, known, tail = union(top_ids, top[:, :-1], top[:, -1], ids, mine[:, :-1])
    expected = reduced(logprobs, joined)
    assert known == pytest.approx(expected[:, :-1], abs=1e-6)
    assert tail == pytest.approx(expected[:, -1], abs=1e-4)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in joined)


def test_a_union_of_everything_leaves_no_tail() -> None:
    logprobs = log_softmax(np.random.default_rng(4).normal(size=(3, 8))).astype(np.float32)
    order = np.argsort(-logprobs, -1).astype(np.int32)
    named = np.take_along_axis(logprobs, order, -1)
    rest = np.log(np.exp(named[:, 5:]).sum(-1))
    _, _, tail = union(order[:, :5], named[:, :5], rest, order[:, 5:], named[:, 5:])
    assert np.exp(tail) == pytest.approx(np.zeros(3), abs=1e-6)


def test_the_fewest_ids_that_reach_a_mass_are_kept_and_the_rest_is_tail() -> None:
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, -1], [8, 9, -1, -1]], np.int32)
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([[0.5, 0.3, 0.1, 0.05], [0.92, 0.03, 0.02, 0], [0.3, 0.2, 0, 0]], np.float32))
        tail = np.log(np.array([0.05, 0.03, 0.5], np.float32))
    kept, known, rest = cut_to_mass(ids, logprobs, tail, 0.89)
    assert kept.tolist() == [[1, 2, 3], [5, -1, -1], [8, 9, -1]]
    assert np.exp(rest) == pytest.approx([0.1, 0.08, 0.5], rel=1e-5)
    assert np.exp(known).sum(-1) + np.exp(rest) == pytest.approx(np.ones(3), rel=1e-5)


def test_top_mass_narrows_what_a_run_learns_from(teacher: Listening) -> None:
    [wide] = ask(teacher, [rollout()], configured(signal="sparse"))
    [narrow] = ask(teacher, [rollout()], configured(signal="sparse", top_mass=0.05))
    assert wide.ids is not None
    assert narrow.ids is not None
    assert narrow.ids.shape[1] < wide.ids.shape[1]


def test_signal_sampled_asks_about_the_tokens_alone_and_needs_the_students(teacher: Listening) -> None:
    config = configured(signal="sampled", temperature=1.0)
    [target] = ask(teacher, [rollout(support_ids=support())], config)
    [request] = teacher.asked
    assert (request.wants.top_k, request.candidate_ids) == (1, None)
    whole = scores_of(teacher)
    own = np.array(rollout().completion_ids)[:, None]
    assert target.token_logprobs == pytest.approx(np.take_along_axis(whole, own, -1)[:, 0], abs=1e-5)
    ask(teacher, [rollout()], configured(signal="sampled", divergence_options={"baseline": "value"}))
    assert teacher.asked[0].wants.top_k == 8
    with pytest.raises(OpdError, match="set signal: exact") as caught:
        ask(teacher, [rollout(source="teacher")], config)
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG


def test_nothing_is_asked_behind_the_last_trained_token(teacher: Listening) -> None:
    partly = rollout(trained=np.array([True, False, True, False, False, False]))
    none = rollout(1, trained=np.zeros(6, np.bool_))
    assert (trained_length(partly), trained_length(none), trained_length(rollout())) == (3, 0, 6)
    first, second = ask(teacher, [partly, none], configured())
    [request] = teacher.asked
    assert request.rows == 3
    assert first.hidden is not None
    assert len(first.hidden) == 3
    assert second.hidden is None


def test_a_share_of_the_completions_measures_the_bias_always_the_same(teacher: Listening) -> None:
    made = [rollout(seed) for seed in range(300)]
    config = configured(signal="sparse", exact_fraction=0.1)
    chosen = [measures_bias(teacher, each, config) for each in made]
    assert 15 <= sum(chosen) <= 45
    assert chosen == [measures_bias(teacher, each, config) for each in made]
    assert chosen != [measures_bias(teacher, each, config.model_copy(update={"seed": 7})) for each in made]
    targets = ask(teacher, made[:40], config)
    assert [target.hidden is not None for target in targets] == chosen[:40]


def test_without_hidden_states_no_bias_is_measured_and_nothing_fails(tiny_teacher: Path) -> None:
    teacher = LocalTeacher(tiny_teacher, supports_hidden=False)
    [target] = ask(teacher, [rollout()], configured(signal="sparse", exact_fraction=1.0))
    assert target.hidden is None
    assert target.ids is not None
