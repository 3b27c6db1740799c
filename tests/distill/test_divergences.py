"""Every divergence, from whole distributions and from K ids with a tail, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.distill import divergences
from opd_daemon.distill.divergences import Divergence, ExactSignal, SparseSignal, at_temperature
from opd_daemon.distill.logits import IMPOSSIBLE, VocabularyMask
from opd_daemon.errors import OpdError, Reason
from tests.distill.reference import CASES, NAMES, derivatives, directions, kl, log_softmax, reduced

ROWS = 19
MASK = mx.array([1.0, 0.0, 1.0, 1.0] * 4 + [0.0, 1.0, 1.0])
KINDS = ("forward_kl", "reverse_kl")

Values = Callable[[Any, Any], Any]
every_divergence = pytest.mark.parametrize(("name", "options", "reference"), CASES, ids=NAMES)
every_temperature = pytest.mark.parametrize("temperature", [1.0, 2.0])
pytestmark = pytest.mark.usefixtures("either_device")


def logits(seed: int, width: int, spread: float = 4.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(ROWS, width)).astype(np.float32) * spread)


def masked(values: mx.array) -> mx.array:
    """As a model whose head is 20 wider than the tokenizer's vocabulary, two of whose ids the other doesn't know."""
    width = values.shape[-1]
    return VocabularyMask(width - 8, [3, 17, *range(width - 20, width)])(values)


def top(values: mx.array, count: int) -> Any:
    return np.argsort(-np.array(values), axis=-1)[:, :count].astype(np.int32)


def signal(teacher: mx.array, ids: Any, temperature: float = 1.0) -> SparseSignal:
    """What a teacher service would answer about these ids."""
    exact = log_softmax(teacher)
    parts = reduced(exact, ids).astype(np.float32)
    plain = SparseSignal(mx.array(ids), mx.array(parts[:, :-1]), mx.array(parts[:, -1]))
    if temperature == 1:
        return plain
    log_z = np.log(np.exp(exact / temperature).sum(-1)).astype(np.float32)
    return at_temperature(plain, mx.array(log_z), temperature)


def check(loss: Divergence, data: Any, student: mx.array, values: Callable[[Any], Any]) -> None:
    """Value, sum, count, closed form and autodiff of a loss against float64 values (N,) of float64 logits."""
    scale = np.array(MASK) * loss.temperature**2
    expected = values(np.array(student, np.float64))
    assert np.array(loss.per_token(student, data)) == pytest.approx(expected, rel=1e-5, abs=2e-6)
    total, count, slopes = loss.gradient(student, data, MASK)
    called, counted = loss(student, data, MASK)
    assert [float(total), float(called)] == pytest.approx([(expected * scale).sum()] * 2, rel=1e-5)
    assert float(count) == float(counted) == float(MASK.sum())

    found = np.array(slopes, np.float64)
    for direction, rate in zip(toward := directions(student.shape), derivatives(values, student, toward), strict=True):
        along = np.where(found == 0, 0, found * direction).sum(-1)
        assert along == pytest.approx(rate * scale, rel=2e-5, abs=2e-5)
    auto = mx.grad(lambda moved: loss(moved, data, MASK)[0])(student)
    assert np.abs(np.array(auto) - found).max() <= 1e-5 * np.abs(found).max() + 1e-7


@every_divergence
@every_temperature
@pytest.mark.parametrize("vocabulary", ["full", "padded"])
def test_exact_value_and_gradient_are_those_of_the_definition(
    name: str, options: dict[str, Any], reference: Values, temperature: float, vocabulary: str
) -> None:
    teacher, student = logits(1, 333), logits(2, 333)
    if vocabulary == "padded":
        teacher, student = masked(teacher), masked(student)
    known = log_softmax(teacher, temperature)
    loss = divergences.get(name, temperature=temperature, **options)
    check(loss, ExactSignal(teacher), student, lambda moved: reference(known, log_softmax(moved, temperature)))


@every_divergence
@every_temperature
@pytest.mark.parametrize(("width", "count"), [(1000, 16), (333, 5), (64, 64)])
def test_sparse_value_and_gradient_are_those_of_the_reduced_distributions(
    name: str, options: dict[str, Any], reference: Values, temperature: float, width: int, count: int
) -> None:
    teacher, student = logits(1, width), logits(2, width)
    ids = top(teacher, count)
    known = reduced(log_softmax(teacher, temperature), ids)
    loss = divergences.get(name, temperature=temperature, **options)
    data = signal(teacher, ids, temperature)
    check(loss, data, student, lambda moved: reference(known, reduced(log_softmax(moved, temperature), ids)))


@every_divergence
def test_logits_of_a_teacher_are_a_signal_and_minus_infinity_masks(
    name: str, options: dict[str, Any], reference: Values
) -> None:
    hidden = mx.arange(100) >= 90
    teacher, student = (mx.where(hidden, -mx.inf, logits(seed, 100)) for seed in (1, 2))
    loss = divergences.get(name, **options)
    expected = reference(log_softmax(teacher), log_softmax(student))
    assert np.array(loss.per_token(student, teacher)) == pytest.approx(expected, rel=1e-5)
    _, _, slopes = loss.gradient(student, teacher, MASK)
    auto = mx.grad(lambda moved: loss(moved, teacher, MASK)[0])(student)
    assert np.array(slopes[:, 90:] == 0).all()
    assert np.abs(np.array(auto) - np.array(slopes)).max() < 1e-6


@every_divergence
def test_nothing_between_equal_models(name: str, options: dict[str, Any], reference: Values) -> None:
    same = logits(5, 500)
    loss = divergences.get(name, **options)
    for data in (ExactSignal(same), signal(same, top(same, 8))):
        total, _, slopes = loss.gradient(same, data, mx.ones((ROWS,)))
        assert abs(float(total)) < 1e-4
        # |s − t| has a kink there: what rounding leaves of s − t gets a sign.
        assert float(mx.abs(slopes).max()) < (0.6 if name == "total_variation" else 1e-5)


@every_divergence
def test_sparse_lies_between_zero_and_exact(name: str, options: dict[str, Any], reference: Values) -> None:
    teacher, student = logits(6, 300), logits(7, 300)
    loss = divergences.get(name, **options)
    exact = np.array(loss.per_token(student, teacher))
    earlier = np.zeros(ROWS)
    for count in (1, 4, 32, 300):
        found = np.array(loss.per_token(student, signal(teacher, top(teacher, count))))
        assert (found >= earlier - 1e-5).all()
        assert (found <= exact + 1e-4).all()
        earlier = found
    assert np.abs(earlier - exact).max() < 1e-4


@every_divergence
def test_unused_places_change_nothing(name: str, options: dict[str, Any], reference: Values) -> None:
    teacher, student = logits(8, 200), logits(9, 200)
    data = signal(teacher, top(teacher, 6))
    wider = SparseSignal(
        mx.concatenate([data.ids, mx.full((ROWS, 3), -1, dtype=mx.int32)], axis=-1),
        mx.concatenate([data.logprobs, mx.full((ROWS, 3), -np.inf)], axis=-1),
        data.tail,
    )
    loss = divergences.get(name, **options)
    first, second = (loss.gradient(student, each, mx.ones((ROWS,))) for each in (data, wider))
    assert float(first[0]) == pytest.approx(float(second[0]), rel=1e-6)
    assert np.abs(np.array(first[2]) - np.array(second[2])).max() < 1e-6


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("edge", [40.0, 200.0])
def test_tiny_tails_keep_gradients_finite_and_right(name: str, edge: float) -> None:
    student = np.zeros((ROWS, 100), dtype=np.float32)
    student[:, :3] = edge
    teacher = logits(10, 100)
    ids = np.tile(np.arange(3, dtype=np.int32), (ROWS, 1))
    _, _, slopes = divergences.get(name).gradient(mx.array(student), signal(teacher, ids), mx.ones((ROWS,)))
    found = np.array(slopes)
    assert np.isfinite(found).all()
    assert np.abs(found.sum(-1)).max() < 1e-4
    if name == "forward_kl":  # the tail has to get back what the teacher gives it: −t per id by share
        tail = np.exp(reduced(log_softmax(teacher), ids)[:, -1:])
        assert found[:, 3:] == pytest.approx(np.repeat(-tail / 97, 97, axis=-1), rel=1e-3)


def test_a_tail_too_small_for_float32_keeps_the_reverse_kl_finite() -> None:
    student = logits(11, 50)
    ids = top(student, 5)
    data = SparseSignal(mx.array(ids), mx.full((ROWS, 5), float(np.log(0.2))), mx.full((ROWS,), -np.inf))
    assert np.isfinite(np.array(divergences.get("reverse_kl").per_token(student, data))).all()


@every_divergence
def test_masked_positions_have_no_value_and_no_gradient_even_if_they_are_no_number(
    name: str, options: dict[str, Any], reference: Values
) -> None:
    teacher, student = np.array(logits(12, 80)), np.array(logits(13, 80))
    student[7:] = np.nan
    mask = mx.array([1.0] * 7 + [0.0] * (ROWS - 7))
    total, count, slopes = divergences.get(name, **options).gradient(mx.array(student), mx.array(teacher), mask)
    expected = reference(log_softmax(teacher[:7]), log_softmax(student[:7])).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == 7
    assert not np.array(slopes[7:]).any()


@every_divergence
def test_clipped_tokens_have_their_limit_as_value_and_no_gradient(
    name: str, options: dict[str, Any], reference: Values
) -> None:
    teacher, student = logits(14, 60), logits(15, 60)
    free = divergences.get(name, **options)
    limit = float(np.median(np.array(free.per_token(student, teacher))))
    loss = divergences.get(name, token_clip=limit, **options)
    for data in (ExactSignal(teacher), signal(teacher, top(teacher, 5))):
        values = np.array(free.per_token(student, data))
        kept, clipped = loss.clipped(mx.array(values))
        assert np.array(clipped).tolist() == (values > limit).tolist()
        assert np.array(kept) == pytest.approx(np.minimum(values, limit))
        assert np.array(loss.per_token(student, data)) == pytest.approx(np.minimum(values, limit), rel=1e-6)
        slopes = np.array(loss.gradient(student, data, mx.ones((ROWS,)))[2])
        expected = np.where((values > limit)[:, None], 0, np.array(free.gradient(student, data, mx.ones((ROWS,)))[2]))
        assert np.abs(slopes - expected).max() < 1e-6
        auto = mx.grad(lambda moved, data=data: loss(moved, data, mx.ones((ROWS,)))[0])(student)
        assert np.abs(np.array(auto) - expected).max() < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_renormalised_ablation_forgets_the_tail_on_both_sides(name: str) -> None:
    teacher, student = logits(16, 120), logits(17, 120)
    ids = top(teacher, 7)

    def values(moved: Any) -> Any:
        pair = [np.take_along_axis(log_softmax(each), ids, -1) for each in (teacher, moved)]
        t, s = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in pair)
        return kl(t, s) if name == "forward_kl" else kl(s, t)

    check(divergences.get(name, tail="renormalised"), signal(teacher, ids), student, values)


def test_ends_of_jsd_are_the_two_kls_to_the_bit() -> None:
    teacher, student = logits(18, 90), logits(19, 90)
    for beta, name in ((0, "forward_kl"), (1, "reverse_kl")):
        pair = (divergences.get("jsd", beta=beta), divergences.get(name))
        first, second = (np.array(loss.per_token(student, teacher)) for loss in pair)
        assert (first == second).all()


def test_jsd_is_bounded_by_log_2_and_total_variation_by_1() -> None:
    teacher, student = logits(20, 60, 30.0), logits(21, 60, 30.0)
    for name, bound in (("jsd", np.log(2)), ("total_variation", 1.0)):
        found = np.array(divergences.get(name).per_token(student, teacher))
        assert (found > -1e-6).all()
        assert (found <= bound + 1e-6).all()


def test_a_divergence_of_ones_own_needs_values_alone() -> None:
    class Squared(Divergence):
        def values(self, logits: mx.array, signal: Any) -> mx.array:
            return ((logits - signal.logits) ** 2).sum(axis=-1)

    teacher, student = logits(22, 30), logits(23, 30)
    total, _, slopes = Squared("squared", temperature=2.0).gradient(student, ExactSignal(teacher), MASK)
    assert float(total) == pytest.approx(float((((student - teacher) ** 2).sum(-1) * MASK).sum() * 4), rel=1e-5)
    assert np.array(slopes) == pytest.approx(np.array(8 * (student - teacher) * MASK[:, None]), rel=1e-4, abs=1e-5)


def test_a_signal_of_another_kind_than_asked_for_is_refused() -> None:
    teacher = logits(24, 30)
    with pytest.raises(TypeError, match="sparse"):
        divergences.get("jsd", signal="sparse").per_token(teacher, teacher)


def test_sampled_tokens_are_no_signal_for_other_divergences() -> None:
    tokens = divergences.SampledSignal(mx.zeros((ROWS,), dtype=mx.int32), mx.zeros((ROWS,)))
    with pytest.raises(OpdError, match="reverse KL") as caught:
        divergences.get("jsd").per_token(logits(25, 30), tokens)
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG


def test_cross_entropy_is_that_of_the_labels() -> None:
    student = logits(26, 70)
    labels = np.arange(ROWS, dtype=np.int32)
    total, count = divergences.ce(student, mx.array(labels), mx.ones((ROWS,)))
    expected = -np.take_along_axis(log_softmax(student), labels[:, None], -1).sum()
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(count) == ROWS


def test_impossible_ids_stay_impossible() -> None:
    student = masked(logits(27, 100))
    assert float(student[0, 3]) == np.float32(IMPOSSIBLE)
    _, _, slopes = divergences.get("reverse_kl").gradient(student, masked(logits(28, 100)), MASK)
    assert not np.array(slopes)[:, [3, 17, *range(80, 92)]].any()
