"""Sparse divergences against float64 formulas over the same outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.distill import divergences, outcomes
from opd_daemon.distill.divergences import SparseSignal, at_temperature

ROWS = 19
KINDS = ("forward_kl", "reverse_kl")


def log_softmax(logits: Any, temperature: float = 1.0) -> Any:
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def reduced(logprobs: Any, ids: Any) -> Any:
    """Log-probabilities of the ids and of everything else, in float64."""
    rest = np.exp(logprobs)
    np.put_along_axis(rest, ids, 0.0, -1)
    with np.errstate(divide="ignore"):
        return np.concatenate([np.take_along_axis(logprobs, ids, -1), np.log(rest.sum(-1, keepdims=True))], -1)


def divergence(name: str, teacher: Any, student: Any) -> Any:
    first, second = (teacher, student) if name == "forward_kl" else (student, teacher)
    possible = np.exp(first) > 0
    return np.where(possible, np.exp(first) * (np.where(possible, first, 0) - np.where(possible, second, 0)), 0).sum(-1)


def logits(seed: int, width: int, spread: float = 4.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(ROWS, width)).astype(np.float32) * spread)


def signal(teacher: mx.array, ids: Any, temperature: float = 1.0) -> SparseSignal:
    """What a teacher service would answer about these ids."""
    exact = log_softmax(teacher)
    parts = reduced(exact, ids).astype(np.float32)
    plain = SparseSignal(mx.array(ids), mx.array(parts[:, :-1]), mx.array(parts[:, -1]))
    if temperature == 1:
        return plain
    log_z = np.log(np.exp(exact / temperature).sum(-1)).astype(np.float32)
    return at_temperature(plain, mx.array(log_z), temperature)


def top(values: mx.array, count: int) -> Any:
    return np.argsort(-np.array(values), axis=-1)[:, :count].astype(np.int32)


@pytest.fixture(params=["_host_outcomes", "_device_outcomes"])
def either_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations: in numpy, and in MLX as on a GPU."""
    monkeypatch.setattr(outcomes, "on_host", lambda: request.param == "_host_outcomes")


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("width", "count"), [(1000, 16), (333, 5), (64, 64)])
def test_value_and_gradient_are_those_of_the_formula(name: str, temperature: float, width: int, count: int) -> None:
    teacher, student = logits(1, width), logits(2, width)
    ids = top(teacher, count)
    loss = divergences.get(name, temperature=temperature)
    mask = mx.ones((ROWS,))

    def total(values: mx.array) -> mx.array:
        return loss(values, signal(teacher, ids, temperature), mask)[0]

    value, gradient = mx.value_and_grad(total)(student)

    t, s = (reduced(log_softmax(values, temperature), ids) for values in (teacher, student))
    per_token = divergence(name, t, s)
    assert float(value) == pytest.approx(per_token.sum() * temperature**2, rel=1e-5)
    with np.errstate(divide="ignore", invalid="ignore"):
        pull = 1 - np.exp(t - s) if name == "forward_kl" else s - t - per_token[:, None]
    probabilities = np.exp(log_softmax(student, temperature))
    expected = probabilities * np.where(np.isfinite(pull[:, -1:]), pull[:, -1:], 0)
    np.put_along_axis(expected, ids, np.exp(s[:, :-1]) * pull[:, :-1], -1)
    assert np.abs(np.array(gradient) - expected * temperature).max() < 1e-5


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    teacher, student = logits(3, 40, spread=1.0), logits(4, 40, spread=1.0)
    data = signal(teacher, top(teacher, 4))
    loss = divergences.get(name)
    gradient = np.array(mx.grad(lambda values: loss(values, data, mx.ones((ROWS,)))[0])(student))
    ids = top(teacher, 4)
    t = reduced(log_softmax(teacher), ids)
    for place in [(0, int(ids[0, 0])), (3, int(ids[3, 2])), (5, 7), (11, 39)]:
        ends = []
        for shift in (1e-4, -1e-4):
            moved = np.array(student, dtype=np.float64)
            moved[place] += shift
            ends.append(divergence(name, t, reduced(log_softmax(moved), ids)).sum())
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-5)


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
def test_nothing_between_equal_models(name: str) -> None:
    same = logits(5, 500)
    data = signal(same, top(same, 8))
    loss = divergences.get(name)
    value, gradient = mx.value_and_grad(lambda values: loss(values, data, mx.ones((ROWS,)))[0])(same)
    assert abs(float(value)) < 1e-4
    assert float(mx.abs(gradient).max()) < 1e-5


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
def test_sparse_lies_between_zero_and_exact(name: str) -> None:
    teacher, student = logits(6, 300), logits(7, 300)
    exact = divergence(name, log_softmax(teacher), log_softmax(student))
    earlier = np.zeros(ROWS)
    for count in (1, 4, 32, 300):
        found = np.array(divergences.get(name).per_token(student, signal(teacher, top(teacher, count))))
        assert (found >= earlier - 1e-5).all()
        assert (found <= exact + 1e-4).all()
        earlier = found
    assert np.abs(earlier - exact).max() < 1e-4


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
def test_unused_places_change_nothing(name: str) -> None:
    teacher, student = logits(8, 200), logits(9, 200)
    data = signal(teacher, top(teacher, 6))
    wider = SparseSignal(
        mx.concatenate([data.ids, mx.full((ROWS, 3), -1, dtype=mx.int32)], axis=-1),
        mx.concatenate([data.logprobs, mx.full((ROWS, 3), -np.inf)], axis=-1),
        data.tail,
    )
    loss = divergences.get(name)
    found = []
    for each in (data, wider):
        pair = mx.value_and_grad(lambda values, each=each: loss(values, each, mx.ones((ROWS,)))[0])(student)
        found.append([np.array(part) for part in pair])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert np.abs(found[0][1] - found[1][1]).max() < 1e-6


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("edge", [40.0, 200.0])
def test_tiny_tails_keep_gradients_finite_and_right(name: str, edge: float) -> None:
    student = np.zeros((ROWS, 100), dtype=np.float32)
    student[:, :3] = edge
    teacher = logits(10, 100)
    ids = np.tile(np.arange(3, dtype=np.int32), (ROWS, 1))
    loss = divergences.get(name)
    data = signal(teacher, ids)
    gradient = np.array(mx.grad(lambda values: loss(values, data, mx.ones((ROWS,)))[0])(mx.array(student)))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient.sum(-1)).max() < 1e-4
    if name == "forward_kl":  # the tail has to get back what the teacher gives it: −t per id by share
        tail = np.exp(reduced(log_softmax(teacher), ids)[:, -1:])
        assert gradient[:, 3:] == pytest.approx(np.repeat(-tail / 97, 97, axis=-1), rel=1e-3)


def test_a_tail_too_small_for_float32_keeps_the_reverse_kl_finite() -> None:
    student = logits(11, 50)
    ids = top(student, 5)
    data = SparseSignal(mx.array(ids), mx.full((ROWS, 5), float(np.log(0.2))), mx.full((ROWS,), -np.inf))
    assert np.isfinite(np.array(divergences.get("reverse_kl").per_token(student, data))).all()


def test_mask_leaves_positions_out() -> None:
    teacher, student = logits(12, 80), logits(13, 80)
    data, loss = signal(teacher, top(teacher, 4)), divergences.get("forward_kl")
    mask = mx.array([1.0] * 7 + [0.0] * (ROWS - 7))
    total, count = loss(student, data, mask)
    assert float(count) == 7
    assert float(total) == pytest.approx(float(loss.per_token(student, data)[:7].sum()), rel=1e-6)


@pytest.mark.usefixtures("either_device")
def test_cross_entropy_is_minus_the_logprob() -> None:
    student = logits(14, 700)
    labels = np.random.default_rng(0).integers(0, 700, ROWS).astype(np.int32)
    total, count = divergences.ce(student, mx.array(labels), mx.ones((ROWS,)))
    expected = -np.take_along_axis(log_softmax(student), labels[:, None], -1).sum()
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(count) == ROWS


@pytest.mark.parametrize(
    ("formula", "bound"), [(divergences.js_divergence, np.log(2)), (divergences.forward_kl, np.inf)]
)
def test_formulas_are_never_negative(formula: Callable[[mx.array, mx.array], mx.array], bound: float) -> None:
    teacher, student = logits(15, 60, 10.0), logits(16, 60, 10.0)
    ids = top(teacher, 6)
    pair = [mx.array(reduced(log_softmax(values), ids).astype(np.float32)) for values in (teacher, student)]
    found = np.array(formula(*pair))
    assert (found > -1e-6).all()
    assert (found <= bound + 1e-6).all()
