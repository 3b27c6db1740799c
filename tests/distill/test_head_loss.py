"""The exact loss from hidden states of both models: what naive autodiff over all logits gives, without its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from opd_daemon.config import parse_config
from opd_daemon.distill import divergences, head_loss
from opd_daemon.distill.batches import HiddenRows, Rows
from opd_daemon.distill.divergences import Divergence, SparseSignal
from opd_daemon.distill.exact import NAMES, compare
from opd_daemon.distill.head_loss import HeadGradient, head_gradient
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.trainer import TeacherHead

ROWS, SIZE, TEACHER_SIZE = 37, 64, 96
# Of one tokenizer with 1450 ids, of which the student doesn't know 7 and 1440; padded differently.
WIDTH, TEACHER_WIDTH, UNKNOWN = 1536, 1600, (7, 1440, *range(1450, 1536))
VOCABULARY = VocabularyMask(WIDTH, UNKNOWN)
KEPT = mx.array(np.setdiff1d(np.arange(WIDTH), UNKNOWN))
MASK = mx.array(([1.0] * 4 + [0.0, 0.25]) * 6 + [1.0])


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@dataclass
class Headed:
    """As much of a student as the loss needs."""

    layer: Any
    finish: Callable[[mx.array], mx.array] = lambda logits: logits
    width: int = WIDTH

    def head(self, states: mx.array) -> mx.array:
        return VOCABULARY(self.finish(self.layer(states)))


def tied() -> Any:
    embedding = nn.Embedding(WIDTH, SIZE)
    embedding.weight = normal(1, WIDTH, SIZE) * 0.5
    return embedding


HEADS: dict[str, Callable[[], Headed]] = {
    "tied": lambda: Headed(tied().as_linear),
    "quantised and tied": lambda: Headed(nn.QuantizedEmbedding.from_embedding(tied(), 64, 4).as_linear),
    "quantised": lambda: Headed(nn.QuantizedLinear.from_linear(nn.Linear(SIZE, WIDTH, bias=False), 64, 8)),
    "with a bias": lambda: Headed(nn.Linear(SIZE, WIDTH)),
    "scaled": lambda: Headed(tied().as_linear, lambda logits: logits * 0.3),
    "soft-capped": lambda: Headed(tied().as_linear, lambda logits: 5 * mx.tanh(logits / 5)),
}


def plain_head(**more: Any) -> TeacherHead:
    tensors = {"weight": np.array(normal(2, TEACHER_WIDTH, TEACHER_SIZE) * 0.4)}
    return TeacherHead(tensors, {"weight": "float32"}, **more)


def quantised_head() -> TeacherHead:
    parts = mx.quantize(normal(2, TEACHER_WIDTH, TEACHER_SIZE) * 0.4, 32, 4)
    tensors = dict(zip(("weight", "scales", "biases"), map(np.array, parts), strict=True))
    return TeacherHead(tensors, dict.fromkeys(tensors, "float32"), 32, 4)


def half_head() -> TeacherHead:
    weight = (normal(2, TEACHER_WIDTH, TEACHER_SIZE) * 0.4).astype(mx.bfloat16)
    return TeacherHead({"weight": np.array(weight.view(mx.uint16))}, {"weight": "bfloat16"})


TEACHER_HEADS: dict[str, Callable[[], TeacherHead]] = {
    "plain": plain_head,
    "quantised": quantised_head,
    "scaled and soft-capped": lambda: plain_head(logit_scale=0.7, soft_cap=6.0),
    "bfloat16": half_head,
}


def rows(labels: Any = None, places: Any = None) -> Rows:
    """Rows with the teacher's hidden states at all positions, or some."""
    numbers = np.arange(ROWS) if places is None else places
    hidden = HiddenRows(np.array(normal(3, ROWS, TEACHER_SIZE)), "float32", numbers)
    aims = np.random.default_rng(4).choice(np.array(KEPT), ROWS) if labels is None else labels
    return Rows(mx.array(aims.astype(np.int32)), MASK, hidden=hidden)


def objective(head: TeacherHead, divergence: Divergence, kl_weight: float = 0.7, ce_weight: float = 0.4) -> Objective:
    return Objective(divergence, kl_weight, ce_weight, lambda: HeadMatrix(head, VOCABULARY))


def run(headed: Headed, states: mx.array, data: Rows, aim: Objective) -> HeadGradient:
    return head_gradient(cast(Student, headed), states, data, aim)


def naive(headed: Headed, head: TeacherHead, name: str, temperature: float, data: Rows) -> Any:
    """Loss of states (N, D), all in one graph."""
    assert data.hidden is not None
    states = mx.array(data.hidden.states).astype(mx.float32)
    matrix = HeadMatrix(head, VocabularyMask(TEACHER_WIDTH))
    teacher = nn.log_softmax(matrix(states)[:, KEPT] / temperature, axis=-1)
    shifted = mx.array(np.searchsorted(np.array(KEPT), np.array(data.labels)))

    def loss(moved: mx.array) -> mx.array:
        logits = headed.finish(headed.layer(moved))[:, KEPT]
        student = nn.log_softmax(logits / temperature, axis=-1)
        t, s = mx.exp(teacher), mx.exp(student)
        m = mx.log(0.5 * (t + s))
        values = {
            "forward_kl": t * (teacher - student),
            "reverse_kl": s * (student - teacher),
            "jsd": 0.5 * (t * (teacher - m) + s * (student - m)),
        }[name].sum(-1)
        ce = -mx.take_along_axis(nn.log_softmax(logits, axis=-1), shifted[:, None], axis=-1)[:, 0]
        return ((0.7 * temperature**2 * values + 0.4 * ce) * MASK).sum()

    return loss


class Written(Divergence):
    """The reverse KL as a plugin would write it: values alone, in MLX."""

    def values(self, logits: mx.array, signal: Any) -> mx.array:
        student = nn.log_softmax(logits / self.temperature, axis=-1)
        teacher = nn.log_softmax(signal.logits / self.temperature, axis=-1)
        return (mx.exp(student) * (student - teacher)).sum(-1)


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_a_divergence_of_a_plugin_gives_what_the_built_in_one_gives(ce_weight: float) -> None:
    headed, states = HEADS["tied"](), normal(6, ROWS, SIZE)
    found, expected = (
        run(headed, states, rows(), objective(plain_head(), divergence, ce_weight=ce_weight))
        for divergence in (Written("written", 2.0), divergences.get("reverse_kl", temperature=2.0))
    )
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    for name, value in expected.values.items():
        np.testing.assert_allclose(np.array(found.values[name]), np.array(value), atol=1e-3, err_msg=name)
    assert np.abs(np.array(found.slope - expected.slope)).max() <= 1e-3 * np.abs(np.array(expected.slope)).max()


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("teacher_head", TEACHER_HEADS)
@pytest.mark.parametrize("student_head", HEADS)
def test_loss_and_slope_are_those_of_naive_autodiff(student_head: str, teacher_head: str) -> None:
    mx.random.seed(5)
    headed, head, data, states = HEADS[student_head](), TEACHER_HEADS[teacher_head](), rows(), normal(6, ROWS, SIZE)
    found = run(headed, states, data, objective(head, divergences.get("reverse_kl", temperature=2.0)))
    expected, slope = mx.value_and_grad(naive(headed, head, "reverse_kl", 2.0, data))(states)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    assert np.abs(np.array(found.slope) - np.array(slope)).max() <= 1e-5 * np.abs(np.array(slope)).max()


@pytest.mark.usefixtures("either_device")
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_kind_of_divergence_is_served(name: str, temperature: float) -> None:
    headed, head, data, states = HEADS["tied"](), plain_head(), rows(), normal(6, ROWS, SIZE)
    aim = objective(head, divergences.get(name, temperature=temperature))
    found = run(headed, states, data, aim)
    expected, slope = mx.value_and_grad(naive(headed, head, name, temperature, data))(states)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    assert np.abs(np.array(found.slope) - np.array(slope)).max() <= 1e-5 * np.abs(np.array(slope)).max()


@pytest.mark.usefixtures("either_device")
def test_watched_values_are_those_of_a_comparison() -> None:
    headed, head, data, states = HEADS["tied"](), plain_head(), rows(), normal(6, ROWS, SIZE)
    found = run(headed, states, data, objective(head, divergences.get("jsd"))).values
    assert data.hidden is not None
    teacher = HeadMatrix(head, VOCABULARY)(data.hidden.array())
    for name, value in compare(teacher, headed.head(states)).items():
        assert np.array(found[name]) == pytest.approx(value, abs=1e-6), name
    assert set(found) == {*NAMES, "kl", "ce", "clipped"}


@pytest.mark.usefixtures("either_device")
def test_a_label_left_open_is_the_teachers_likeliest_token() -> None:
    headed, head, states = HEADS["tied"](), plain_head(), normal(6, ROWS, SIZE)
    open_rows = rows(labels=np.full(ROWS, -1))
    assert open_rows.hidden is not None
    likeliest = np.array(mx.argmax(HeadMatrix(head, VOCABULARY)(open_rows.hidden.array()), axis=-1))
    aim = objective(head, divergences.get("jsd"))
    first, second = (run(headed, states, data, aim) for data in (open_rows, rows(labels=likeliest)))
    assert float(first.loss) == float(second.loss)
    assert np.array_equal(np.array(first.slope), np.array(second.slope))


@pytest.mark.usefixtures("either_device")
def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    headed, head, data, states = HEADS["soft-capped"](), quantised_head(), rows(), normal(6, ROWS, SIZE)
    aim = objective(head, divergences.get("jsd", temperature=2.0, token_clip=0.4))
    whole = run(headed, states, data, aim)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    chunked = run(headed, states, data, aim)
    assert float(chunked.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert np.abs(np.array(chunked.slope) - np.array(whole.slope)).max() < 1e-6
    assert 0 < float(whole.values["clipped"].sum()) < ROWS
    for name, value in whole.values.items():
        assert np.array(chunked.values[name]) == pytest.approx(np.array(value), abs=1e-6), name


@pytest.mark.usefixtures("either_device")
def test_a_divergence_of_a_plugin_gets_the_same_treatment() -> None:
    class Own(Divergence):
        def values(self, logits: mx.array, signal: Any) -> mx.array:
            return divergences.get("jsd", temperature=self.temperature).values(logits, signal)

    headed, head, data, states = HEADS["tied"](), plain_head(), rows(), normal(6, ROWS, SIZE)
    own, built_in = (
        run(headed, states, data, objective(head, loss))
        for loss in (Own("own", 2.0, 0.49), divergences.get("jsd", temperature=2.0, token_clip=0.49))
    )
    assert float(own.loss) == pytest.approx(float(built_in.loss), rel=1e-6)
    assert np.abs(np.array(own.slope) - np.array(built_in.slope)).max() < 1e-5
    for name, value in built_in.values.items():
        assert np.array(own.values[name]) == pytest.approx(np.array(value), abs=1e-6), name


def sparse_rows(teacher: mx.array, places: Any) -> Rows:
    """Rows about the teacher's three likeliest ids, with its hidden states at some of them."""
    logprobs = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    ids = mx.argsort(-teacher, axis=-1)[:, :3].astype(mx.int32)
    named = mx.take_along_axis(logprobs, ids, axis=-1)
    signal = SparseSignal(ids, named, mx.log1p(-mx.exp(named).sum(-1)))
    data = rows(places=places)
    return Rows(data.labels, MASK, signal, signal, ids[:, 0], mx.zeros((ROWS,)), data.hidden)


@pytest.mark.usefixtures("either_device")
def test_the_bias_is_exact_minus_sparse_where_hidden_states_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    headed, head, states = HEADS["tied"](), plain_head(), normal(6, ROWS, SIZE)
    hidden = rows().hidden
    assert hidden is not None
    teacher = HeadMatrix(head, VOCABULARY)(hidden.array())
    known = np.array([3, 4, 20, 36])
    places = np.full(ROWS, -1)
    places[known] = known
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    loss = divergences.get("reverse_kl")
    found = run(headed, states, sparse_rows(teacher, places), objective(head, loss)).values
    gap = np.array(loss.per_token(headed.head(states), teacher)) - np.array(found["kl"])
    assert np.array(found["bias_gap"]) == pytest.approx(gap[known], abs=1e-5)
    assert (gap > -1e-5).all()
    without = run(headed, states, sparse_rows(teacher, np.full(ROWS, -1)), objective(head, loss))
    assert "bias_gap" not in without.values


@pytest.mark.usefixtures("either_device")
def test_cross_entropy_needs_no_teacher() -> None:
    headed, states = HEADS["quantised"](), normal(6, ROWS, SIZE)
    labels = rows().labels
    config = parse_config(
        {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p", "kl_weight": 0.0, "ce_weight": 2.0}
    )
    found = run(headed, states, Rows(labels, MASK), Objective.from_config(config))

    def plain(moved: mx.array) -> mx.array:
        return (2.0 * nn.losses.cross_entropy(headed.head(moved), labels) * MASK).sum()

    expected, slope = mx.value_and_grad(plain)(states)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    assert np.abs(np.array(found.slope) - np.array(slope)).max() <= 1e-5 * np.abs(np.array(slope)).max()
    assert set(found.values) == {"ce", "student_entropy"}


def test_a_head_that_gives_its_input_back_keeps_it() -> None:
    """A model that can't be split has logits for states: the gradient must not be written over them."""
    states = normal(7, ROWS, WIDTH)
    before = np.array(states)
    whole = Headed(lambda logits: logits)
    whole.head = lambda logits: logits  # type: ignore[method-assign]
    data = Rows(rows().labels, MASK)
    run(whole, states, data, objective(plain_head(), divergences.get("jsd"), kl_weight=0.0))
    assert np.array_equal(np.array(states), before)
