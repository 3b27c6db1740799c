"""The gradient of a step: equal to plain autodiff, and the same however the step is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from opd_daemon.config import Backward, LoraConfig, RunConfig, parse_config
from opd_daemon.distill import head_loss
from opd_daemon.distill.batches import packed
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import BatchGradient, gradient
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.student import Student
from tests.distill.local_teacher import LocalTeacher

PATHS = {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p"}
SETTINGS = {**PATHS, "ce_weight": 0.3, "top_k": 16, "signal": "sparse"}


def configured(**changes: Any) -> RunConfig:
    return parse_config({**SETTINGS, **changes})


@pytest.fixture
def student(tiny_student: Path) -> Student:
    """A student whose adapter already does something."""
    loaded = Student.load(tiny_student, None, LoraConfig(rank=4), seed=3)
    noise = np.random.default_rng(0)
    moved = {
        name: tensor + mx.array(noise.normal(size=tensor.shape).astype(np.float32) * 0.05)
        for name, tensor in loaded.parameters().items()
    }
    loaded.update(moved)
    return loaded


@pytest.fixture
def teacher(tiny_teacher: Path) -> LocalTeacher:
    return LocalTeacher(tiny_teacher)


def rollouts(lengths: list[tuple[int, int]]) -> list[Rollout]:
    numbers = np.random.default_rng(1)
    made = []
    for index, (asked, said) in enumerate(lengths):
        ids = numbers.integers(0, 400, asked + said).tolist()
        made.append(Rollout(Prompt(index, "", tuple(ids[:asked])), tuple(ids[asked:]), stopped="stop", source="data"))
    return made


LENGTHS = [(5, 9), (3, 1), (17, 4), (8, 12), (2, 6)]


def step(student: Student, teacher: LocalTeacher, config: RunConfig, size: int) -> tuple[dict[str, Any], float, Any]:
    """Gradient per token, loss per token and per-token values of a whole step."""
    made = rollouts(LENGTHS)
    batches = packed(made, ask(teacher, made, config), size=size, temperature=config.temperature, labels="completion")
    results: list[BatchGradient] = [
        gradient(student, batch, Objective.from_config(config), config.backward) for batch in batches
    ]
    count = sum(result.count for result in results)
    total: dict[str, Any] = {}
    for result in results:
        for name, value in tree_flatten(result.gradients):
            total[name] = total.get(name, 0) + np.array(value) / count
    return total, sum(result.loss for result in results) / count, [result.values for result in results]


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.abs(value - second[name]).max() <= 2e-5 * max(np.abs(value).max(), 1e-3), name


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_that_of_plain_autodiff(
    student: Student, teacher: LocalTeacher, divergence: str, temperature: float
) -> None:
    config = configured(divergence=divergence, temperature=temperature)
    found, loss, _ = step(student, teacher, config, size=5)
    made = rollouts(LENGTHS)
    targets = ask(teacher, made, config)

    def plain() -> mx.array:
        total = mx.zeros(())
        for rollout, target in zip(made, targets, strict=True):
            logits = student.logits(mx.array(rollout.token_ids)[None])[0, rollout.score_from - 1 : -1]
            tempered = nn.log_softmax(logits / temperature, axis=-1)
            ids = mx.array(target.ids)
            named = mx.take_along_axis(tempered, ids, axis=-1)
            s = mx.concatenate([named, mx.log1p(-mx.exp(named).sum(-1, keepdims=True))], axis=-1)
            t = mx.array(target.logprobs) / temperature
            t = t - (mx.array(target.log_z)[:, None] if target.log_z is not None else 0)
            t = mx.concatenate([t, mx.log1p(-mx.exp(t).sum(-1, keepdims=True))], axis=-1)
            p, q = (t, s) if divergence == "forward_kl" else (s, t)
            kl = (mx.exp(p) * (p - q)).sum() * temperature**2
            labels = mx.array(list(rollout.completion_ids))[:, None]
            ce = -mx.take_along_axis(nn.log_softmax(logits, axis=-1), labels, axis=-1).sum()
            total = total + config.kl_weight * kl + config.ce_weight * ce
        return total / sum(said for _, said in LENGTHS)

    expected_loss, expected = nn.value_and_grad(student.model, plain)()
    assert loss == pytest.approx(float(expected_loss), rel=1e-4)
    flat = dict(tree_flatten(expected))
    for name, value in found.items():
        assert np.abs(value - np.array(flat[name])).max() <= 1e-3 * np.abs(value).max(), name


def test_loss_and_gradient_do_not_depend_on_the_micro_batch(student: Student, teacher: LocalTeacher) -> None:
    whole = step(student, teacher, configured(), size=5)
    for size in (1, 2, 3):
        part = step(student, teacher, configured(), size)
        assert part[1] == pytest.approx(whole[1], rel=1e-5)
        assert_equal(whole[0], part[0])
        assert sum(len(values["kl"]) for values in part[2]) == sum(said for _, said in LENGTHS)


def test_chunks_change_nothing(student: Student, teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step(student, teacher, configured(), size=5)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    chunked = step(student, teacher, configured(), size=5)
    assert_equal(whole[0], chunked[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_mode_of_the_backward_changes_a_bit(tiny_student: Path, teacher: LocalTeacher, dropout: float) -> None:
    """Also over several micro-batches: what one draws doesn't depend on how the one before it was pulled back."""
    student = Student.load(tiny_student, None, LoraConfig(rank=4, dropout=dropout), seed=3)
    student.update({name: tensor + 0.05 for name, tensor in student.parameters().items()})
    found = {}
    for mode in get_args(Backward):
        mx.random.seed(7)
        found[mode] = step(student, teacher, configured(backward=mode), size=2)
    for total, loss, _ in found.values():
        assert loss == found["plain"][1]
        assert all(np.array_equal(value, found["plain"][0][name]) for name, value in total.items())
    mx.random.seed(8)
    other = step(student, teacher, configured(), size=2)
    assert (other[1] != found["plain"][1]) == bool(dropout)


def test_a_model_whose_blocks_cannot_be_driven_has_the_same_gradient(student: Student, teacher: LocalTeacher) -> None:
    driven = step(student, teacher, configured(), size=5)
    student.blocks = None
    assert_equal(driven[0], step(student, teacher, configured(), size=5)[0])


def test_rows_are_completion_tokens_whatever_their_ids(student: Student, teacher: LocalTeacher) -> None:
    """Padding and EOS have ids that also occur inside completions, so masks can't come from values."""
    eos = student.eos_ids[0]
    made = [
        Rollout(Prompt(0, "", (1, 0, 2)), (0, eos, 0, 5), stopped="stop", source="data"),
        Rollout(Prompt(1, "", (4,)), (eos,), stopped="stop", source="data"),
    ]
    targets = ask(teacher, made, configured())
    (batch,) = packed(made, targets, size=2, temperature=2.0, labels="completion")
    assert batch.tokens.shape == (2, 16)
    assert np.array(batch.places).tolist() == [0, 16 + 2, 16 + 3, 16 + 4, 16 + 5]
    assert np.array(batch.rows.labels).tolist() == [eos, 0, eos, 0, 5]


def test_padding_does_not_reach_the_states(student: Student) -> None:
    made = rollouts([(4, 3), (30, 10)])
    from opd_daemon.distill.batches import pad

    padded = np.array(student.states_at(*pad(made)))
    alone = np.array(student.states_at(*pad(made[:1])))
    assert np.abs(padded[:3] - alone).max() < 1e-5
