"""The reverse KL from sampled tokens: what it is on the mean, by going through every token there is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.distill import divergences
from opd_daemon.distill.divergences import Divergence, ExactSignal, SampledSignal, SparseSignal
from opd_daemon.errors import OpdError, Reason
from tests.distill.reference import log_softmax, reduced

WIDTH = 11
pytestmark = pytest.mark.usefixtures("either_device")


@pytest.fixture
def teacher() -> mx.array:
    return mx.array(np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32) * 2)


@pytest.fixture
def student() -> mx.array:
    return mx.array(np.random.default_rng(2).normal(size=(1, WIDTH)).astype(np.float32) * 2)


def every_token(teacher: mx.array, temperature: float = 1.0, **more: Any) -> SampledSignal:
    """One row for every token of the vocabulary."""
    logprobs = log_softmax(teacher, temperature)[0].astype(np.float32)
    return SampledSignal(mx.arange(WIDTH, dtype=mx.int32), mx.array(logprobs), **more)


def of_every_token(loss: Divergence, student: mx.array, signal: SampledSignal) -> tuple[Any, Any]:
    """Values (V,) and gradients (V, V) if each token in turn is the sampled one."""
    values, slopes = loss.slopes(mx.repeat(student, WIDTH, axis=0), signal)
    return np.array(values, np.float64), np.array(slopes, np.float64)


def probabilities(logits: mx.array, temperature: float = 1.0) -> Any:
    return np.exp(log_softmax(logits, temperature))[0]


def teacher_top(teacher: mx.array, temperature: float, count: int = 3) -> SparseSignal:
    ids = np.tile(np.argsort(-np.array(teacher))[:, :count].astype(np.int32), (WIDTH, 1))
    parts = reduced(log_softmax(np.tile(teacher, (WIDTH, 1)), temperature), ids).astype(np.float32)
    return SparseSignal(mx.array(ids), mx.array(parts[:, :-1]), mx.array(parts[:, -1]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("baseline", ["none", "exact", "sparse"])
def test_expected_value_and_gradient_are_those_of_the_reverse_kl(
    teacher: mx.array, student: mx.array, temperature: float, baseline: str
) -> None:
    support = {
        "none": None,
        "exact": ExactSignal(mx.repeat(teacher, WIDTH, axis=0)),
        "sparse": teacher_top(teacher, temperature),
    }[baseline]
    options = {} if baseline == "none" else {"baseline": "value"}
    loss = divergences.get("reverse_kl", temperature=temperature, **options)
    values, slopes = of_every_token(loss, student, every_token(teacher, temperature, support=support))
    weights = probabilities(student, temperature)
    exact_value, exact_slope = loss.slopes(student, ExactSignal(teacher))
    assert weights @ values == pytest.approx(float(exact_value[0]), rel=1e-5)
    assert weights @ slopes == pytest.approx(np.array(exact_slope[0]), abs=1e-6)


def test_a_baseline_takes_variance_away_where_the_tokens_of_a_position_share_it(student: mx.array) -> None:
    """The teacher knows what comes next and the student doesn't: nearly all its tokens are equally bad."""
    student = 0.1 * student
    teacher = 6.0 * (mx.arange(WIDTH)[None] == 0).astype(mx.float32)
    weights = probabilities(student)
    signal = every_token(teacher, support=ExactSignal(mx.repeat(teacher, WIDTH, axis=0)))

    def variance(**options: Any) -> float:
        slopes = of_every_token(divergences.get("reverse_kl", **options), student, signal)[1]
        return float(weights @ ((slopes - weights @ slopes) ** 2).sum(-1))

    assert variance(baseline="value") < 0.5 * variance()


def test_weights_correct_samples_of_an_older_student(teacher: mx.array, student: mx.array) -> None:
    older = student + mx.array(np.random.default_rng(4).normal(size=(1, WIDTH)).astype(np.float32) * 0.5)
    behaviour = mx.array(log_softmax(older)[0].astype(np.float32))
    loss = divergences.get("reverse_kl", importance_clip=1e6)
    values, slopes = of_every_token(loss, student, every_token(teacher, behaviour_logprobs=behaviour))
    exact_value, exact_slope = loss.slopes(student, ExactSignal(teacher))
    assert probabilities(older) @ values == pytest.approx(float(exact_value[0]), rel=1e-5)
    assert probabilities(older) @ slopes == pytest.approx(np.array(exact_slope[0]), abs=1e-6)


def test_weights_stop_growing_at_their_limit(teacher: mx.array, student: mx.array) -> None:
    behaviour = mx.array(log_softmax(student)[0].astype(np.float32)) - mx.array(np.linspace(-1, 1, WIDTH), mx.float32)
    signal = every_token(teacher, behaviour_logprobs=behaviour)
    rows = mx.repeat(student, WIDTH, axis=0)
    free, limited = (divergences.get("reverse_kl", importance_clip=limit) for limit in (100.0, 1.5))
    factors = np.minimum(np.exp(np.linspace(-1, 1, WIDTH)), 1.5) / np.exp(np.linspace(-1, 1, WIDTH))
    assert np.array(limited.slopes(rows, signal)[1]) == pytest.approx(
        np.array(free.slopes(rows, signal)[1]) * factors[:, None], rel=1e-4, abs=1e-6
    )
    assert np.array(limited.clipped_weights(rows, signal)).tolist() == (factors < 1).tolist()


@pytest.mark.parametrize("options", [{}, {"baseline": "value"}, {"importance_clip": 1.2}, {"token_clip": 0.8}])
def test_autodiff_gives_the_closed_form(teacher: mx.array, student: mx.array, options: dict[str, Any]) -> None:
    signal = every_token(
        teacher,
        2.0,
        behaviour_logprobs=mx.array(log_softmax(student, 2.0)[0].astype(np.float32)) + 0.1,
        support=teacher_top(teacher, 2.0),
    )
    loss = divergences.get("reverse_kl", temperature=2.0, **options)
    rows, mask = mx.repeat(student, WIDTH, axis=0), mx.array([1.0, 0.0] * 5 + [1.0])
    total, auto = mx.value_and_grad(lambda moved: loss(moved, signal, mask)[0])(rows)
    closed_total, count, slopes = loss.gradient(rows, signal, mask)
    assert float(total) == pytest.approx(float(closed_total), rel=1e-5)
    assert float(count) == 6
    assert np.array(auto) == pytest.approx(np.array(slopes), abs=1e-6)


@pytest.mark.parametrize("options", [{"baseline": "value"}, {"importance_clip": 2.0}])
def test_what_a_variant_needs_is_asked_for(teacher: mx.array, student: mx.array, options: dict[str, Any]) -> None:
    loss = divergences.get("reverse_kl", signal="sampled", **options)
    with pytest.raises(OpdError, match="needs") as caught:
        loss.per_token(mx.repeat(student, WIDTH, axis=0), every_token(teacher))
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG
