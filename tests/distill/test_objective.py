"""A run's objective on real models: right from hidden states to adapter gradients, however the step is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from opd_daemon.config import LoraConfig, RunConfig, parse_config
from opd_daemon.distill import registry
from opd_daemon.distill.batches import Labels, packed
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import BatchGradient, gradient
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.vocabulary import compare_vocabularies, load_vocabulary
from tests.distill.local_teacher import LocalTeacher
from tests.tiny import write_tiny_qwen2

PATHS = {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p"}
LENGTHS = [(5, 9), (3, 1), (17, 24), (8, 12), (2, 6)]
TOKENS = sum(said for _, said in LENGTHS)


def configured(**changes: Any) -> RunConfig:
    return parse_config({**PATHS, "ce_weight": 0.3, "temperature": 2.0, "generation_temperature": 2.0, **changes})


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


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> LocalTeacher:
    """A teacher with another hidden size, another padding and two tokens more than the student's tokenizer has."""
    path = tmp_path_factory.mktemp("models") / "wide"
    tokens = ("<think>", "</think>")
    return LocalTeacher(write_tiny_qwen2(path, seed=4, hidden=96, vocab=704, extra_tokens=tokens))


def rollouts(**more: Any) -> list[Rollout]:
    numbers = np.random.default_rng(1)
    made = []
    for index, (asked, said) in enumerate(LENGTHS):
        ids = numbers.integers(0, 400, asked + said).tolist()
        behaviour = numbers.normal(-6, 1, said).astype(np.float32)
        prompt = Prompt(index, "", tuple(ids[:asked]))
        made.append(Rollout(prompt, tuple(ids[asked:]), "stop", "student", behaviour_logprobs=behaviour, **more))
    return made


def step(
    student: Student,
    teacher: LocalTeacher,
    config: RunConfig,
    made: Sequence[Rollout],
    size: int,
    *,
    max_tokens: int = 0,
    labels: Labels = "completion",
) -> tuple[dict[str, Any], float, list[BatchGradient]]:
    """Gradient and loss of a whole step, divided by its count, and its parts."""
    objective = Objective.from_config(config, head=lambda: HeadMatrix(teacher.head(), student.vocabulary))
    batches = packed(
        made,
        ask(teacher, made, config, masked(student, teacher)),
        size=size,
        temperature=config.temperature,
        labels=labels,
        max_tokens=max_tokens,
        loss_mean=config.loss_mean,
        sampled=config.signal == "sampled",
    )
    results = [gradient(student, batch, objective) for batch in batches]
    count = sum(result.count for result in results)
    total: dict[str, Any] = {}
    for result in results:
        for name, value in tree_flatten(result.gradients):
            total[name] = total.get(name, 0) + np.array(value) / count
    return total, sum(result.loss for result in results) / count, results


def masked(student: Student, teacher: LocalTeacher) -> tuple[int, ...]:
    match = compare_vocabularies(
        load_vocabulary(Path(teacher.info.path)),
        {index: token for token, index in student.tokenizer.get_vocab().items()},
    )
    unshared = (*match.only_teacher, *match.only_student)
    student.mask_vocabulary((*unshared, *range(teacher.info.vocab_size, student.width)), teacher.info.padded_vocab_size)
    return tuple(index for index in unshared if index < teacher.info.vocab_size)


def assert_equal(first: dict[str, Any], second: dict[str, Any], tolerance: float = 2e-5) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.abs(value - second[name]).max() <= tolerance * max(np.abs(value).max(), 1e-3), name


def known_logits(model: Any, tokens: mx.array, start: int) -> mx.array:
    """Logits of the tokens both models know (403), at the positions that predict the completion."""
    logits: mx.array = model(tokens[None])[0, start - 1 : -1, :403]
    return logits


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_exact_gradient_is_that_of_plain_autodiff_through_both_models(
    student: Student, wide_teacher: LocalTeacher, divergence: str, loss_mean: str
) -> None:
    config = configured(divergence=divergence, loss_mean=loss_mean)
    made = rollouts()
    found, loss, results = step(student, wide_teacher, config, made, size=2)
    assert all(result.batch.rows.exact for result in results)

    def plain() -> mx.array:
        total = mx.zeros(())
        for rollout in made:
            tokens = mx.array(rollout.token_ids)
            logits = known_logits(student.model, tokens, rollout.score_from)
            t = nn.log_softmax(known_logits(wide_teacher.model, tokens, rollout.score_from) / 2, axis=-1)
            s = nn.log_softmax(logits / 2, axis=-1)
            m = mx.logaddexp(t, s) - np.log(2)
            value = {
                "forward_kl": mx.exp(t) * (t - s),
                "reverse_kl": mx.exp(s) * (s - t),
                "jsd": 0.5 * (mx.exp(t) * (t - m) + mx.exp(s) * (s - m)),
            }[divergence].sum(-1)
            ce = nn.losses.cross_entropy(logits, mx.array(list(rollout.completion_ids)))
            each = config.kl_weight * 4 * value + config.ce_weight * ce
            total = total + (each.sum() / TOKENS if loss_mean == "token" else each.mean() / len(made))
        return total

    expected_loss, expected = nn.value_and_grad(student.model, plain)()
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert_equal({name: np.array(value) for name, value in tree_flatten(expected)}, found, 1e-4)


SIGNALS: dict[str, dict[str, Any]] = {
    "exact": {"signal": "exact"},
    "sparse": {"signal": "sparse", "top_k": 8},
    "sampled": {"signal": "sampled", "divergence_options": {"baseline": "value"}, "top_k": 8},
    "clipped": {"signal": "exact", "divergence": "jsd", "divergence_options": {"token_clip": 0.4}},
}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut_up(
    student: Student, wide_teacher: LocalTeacher, name: str, loss_mean: str
) -> None:
    config = configured(**SIGNALS[name], loss_mean=loss_mean, exact_fraction=0.0)
    trained = {2: np.arange(24) % 3 > 0, 3: np.arange(12) < 5}
    made = [
        Rollout(each.prompt, each.completion_ids, "stop", "student", trained=trained.get(index))
        for index, each in enumerate(rollouts())
    ]
    whole = step(student, wide_teacher, config, made, size=5)
    cuts: list[dict[str, int]] = [{"size": 1}, {"size": 2}, {"size": 5, "max_tokens": 40}]
    for cut in cuts:
        part = step(student, wide_teacher, config, made, **cut)
        assert len(part[2]) > 1
        assert part[1] == pytest.approx(whole[1], rel=1e-5)
        assert_equal(whole[0], part[0], 5e-5)
    rows = sum(len(result.batch.rows) for result in whole[2])
    assert rows == TOKENS - 8 - 7
    assert sum(len(result.values["kl"]) for result in whole[2]) == rows


def test_the_bias_meter_tells_how_much_a_sparse_signal_misses(student: Student, wide_teacher: LocalTeacher) -> None:
    sparse = configured(signal="sparse", top_k=4, exact_fraction=1.0)
    _, _, metered = step(student, wide_teacher, sparse, rollouts(), size=2)
    _, _, exact = step(student, wide_teacher, configured(), rollouts(), size=2)
    gaps, values, truth = (
        np.concatenate([result.values[name] for result in results])
        for results, name in ((metered, "bias_gap"), (metered, "kl"), (exact, "kl"))
    )
    assert gaps == pytest.approx(truth - values, abs=2e-5)
    assert gaps.mean() > 0.01
    assert all("bias_gap" not in result.values for result in exact)


def test_a_divergence_of_sparse_signals_alone_has_no_exact_value_to_compare_with(
    student: Student, wide_teacher: LocalTeacher
) -> None:
    sparse = configured(divergence="mine", signal="sparse", top_k=4, exact_fraction=1.0)
    offered = {"mine": replace(registry.BUILT_IN["forward_kl"], name="mine", signals=("sparse",))}
    objective = Objective.from_config(sparse, head=lambda: pytest.fail("nobody needs the head"), offered=offered)
    (batch,) = packed(
        rollouts()[:2],
        ask(wide_teacher, rollouts()[:2], sparse, masked(student, wide_teacher)),
        size=2,
        temperature=sparse.temperature,
        labels="completion",
    )
    assert "bias_gap" not in gradient(student, batch, objective).values


def test_a_sampled_step_weighs_by_what_sampled(student: Student, wide_teacher: LocalTeacher) -> None:
    options = {"importance_clip": 1.5}
    config = configured(signal="sampled", divergence_options=options, ce_weight=0.0, exact_fraction=0.0)
    _, _, results = step(student, wide_teacher, config, rollouts(), size=5)
    clipped = np.concatenate([result.values["clipped"] for result in results])
    assert 0 < clipped.mean() < 1
    for name in ("forward_kl", "reverse_kl", "teacher_support_mass", "teacher_entropy", "agreement"):
        assert np.isfinite(np.concatenate([result.values[name] for result in results])).all()


def test_teacher_equal_to_student_gives_nothing(tiny_student: Path) -> None:
    student, teacher = Student.load(tiny_student, None, LoraConfig(rank=4), seed=3), LocalTeacher(tiny_student)
    for changes in SIGNALS.values():
        found, loss, _ = step(student, teacher, configured(**changes, ce_weight=0.0), rollouts(), size=3)
        assert abs(loss) < 1e-4
        assert max(np.abs(value).max() for value in found.values()) < 1e-4


@pytest.mark.parametrize("ce_weight", [0.0, 0.2])
def test_what_is_watched_does_not_depend_on_the_weights(tiny_student: Path, ce_weight: float) -> None:
    student, teacher = Student.load(tiny_student, None, LoraConfig(rank=4), seed=3), LocalTeacher(tiny_student)
    for changes in SIGNALS.values():
        config = configured(**changes, ce_weight=ce_weight)
        # Labels that are the student's favourites: what the cross-entropy leaves of the logits has others.
        _, _, results = step(student, teacher, config, rollouts(), size=3, labels="teacher")
        for name in ("agreement", "top5_agreement"):
            assert np.concatenate([result.values[name] for result in results]).min() == 1.0, changes
        for name in ("forward_kl", "reverse_kl", "js_divergence"):
            assert np.abs(np.concatenate([result.values[name] for result in results])).max() < 1e-4, changes
