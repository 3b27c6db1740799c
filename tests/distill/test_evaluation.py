"""Held-out evaluation against float64 over both whole distributions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import LoraConfig, parse_config
from opd_daemon.distill import tokenwise
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.evaluation import Evaluator, ask_ahead, by_position
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.rollouts import sample_completions
from opd_daemon.distill.step import step_seed
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix, as_mlx
from opd_daemon.trainer import TeacherHead, TrainerInfo
from opd_daemon.types import GeneratedToken, GenerateRequest
from tests.distill.local_teacher import LocalTeacher

CONFIG = parse_config(
    {
        "base_model_path": "b",
        "teacher_model_path": "t",
        "prompts_path": "p",
        "max_generation_tokens": 9,
        "top_k": 32,
        "temperature": 3.0,
    }
)
PROMPTS = [Prompt(i, "", tuple(range(7 + i, 12 + 3 * i))) for i in range(5)]


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return Student.load(tiny_student, None, LoraConfig(rank=4), seed=0)


def log_softmax(values: Any) -> Any:
    wide = np.array(values, dtype=np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_exact_metrics_are_those_of_both_whole_distributions(tiny_teacher: Path, student: Student) -> None:
    teacher = LocalTeacher(tiny_teacher)
    evaluator = Evaluator(teacher, student, PROMPTS, CONFIG, masked_token_ids=(3,))
    student.mask_vocabulary([3])
    found = evaluator.measure(7)

    gathered: dict[str, list[Any]] = {"forward_kl": [], "reverse_kl": [], "agreement": [], "teacher_entropy": []}
    for rollout in evaluator.rollouts:
        kept = [index for index in range(teacher.info.vocab_size) if index != 3]
        rows = slice(rollout.score_from - 1, -1)
        tokens = mx.array(rollout.token_ids)[None]
        t = log_softmax(np.array(teacher.model(tokens))[0, rows][:, kept])
        s = log_softmax(np.array(student.model(tokens))[0, rows][:, kept])
        gathered["forward_kl"].append((np.exp(t) * (t - s)).sum(-1))
        gathered["reverse_kl"].append((np.exp(s) * (s - t)).sum(-1))
        gathered["agreement"].append(t.argmax(-1) == s.argmax(-1))
        gathered["teacher_entropy"].append(-(np.exp(t) * t).sum(-1))
    for name, values in gathered.items():
        assert getattr(found, name) == pytest.approx(np.concatenate(values).mean(), abs=1e-4), name
    assert found.exact
    assert (found.step, found.samples) == (7, 5)
    assert found.tokens == sum(len(rollout.completion_ids) for rollout in evaluator.rollouts)


def test_the_teachers_writing_is_part_of_the_first_evaluation_alone(tiny_teacher: Path, student: Student) -> None:
    class Slow(LocalTeacher):
        def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
            time.sleep(0.3)
            return super().generate(requests)

    evaluator = Evaluator(Slow(tiny_teacher), student, PROMPTS, CONFIG)
    assert evaluator.rollouts  # someone else may ask for them first
    first = evaluator.measure(0)
    assert first.seconds > evaluator.once_seconds > 0.3
    evaluator.measure(1)
    assert evaluator.once_seconds == 0.0


def test_a_teacher_without_a_head_is_compared_sparsely(tiny_teacher: Path, student: Student) -> None:
    exact = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, CONFIG).measure(0)
    sparse = Evaluator(LocalTeacher(tiny_teacher, supports_hidden=False), student, PROMPTS, CONFIG).measure(0)
    assert not sparse.exact
    assert 0 < sparse.forward_kl <= exact.forward_kl + 1e-4
    assert 0 < sparse.reverse_kl <= exact.reverse_kl + 1e-4
    for name in ("agreement", "top5_agreement", "student_entropy", "teacher_entropy"):
        assert getattr(sparse, name) == pytest.approx(getattr(exact, name), abs=1e-4)
    assert exact.on_teacher is not None
    assert sparse.on_teacher is not None
    assert exact.on_teacher.acceptance - 1e-4 <= sparse.on_teacher.acceptance < 1


def test_acceptance_and_js_are_those_of_both_distributions(tiny_teacher: Path, student: Student) -> None:
    teacher = LocalTeacher(tiny_teacher)
    evaluator = Evaluator(teacher, student, PROMPTS, CONFIG)
    found = evaluator.measure(0).on_teacher
    assert found is not None
    shared, js = [], []
    for rollout in evaluator.rollouts:
        rows = slice(rollout.score_from - 1, -1)
        tokens = mx.array(rollout.token_ids)[None]
        known = teacher.info.vocab_size
        t = np.exp(log_softmax(np.array(teacher.model(tokens))[0, rows][:, :known]))
        s = np.exp(log_softmax(np.array(student.model(tokens))[0, rows][:, :known]))
        m = 0.5 * (t + s)
        shared.append(np.minimum(t, s).sum(-1))
        js.append(0.5 * (t * np.log(t / m) + s * np.log(s / m)).sum(-1))
    assert found.acceptance == pytest.approx(np.concatenate(shared).mean(), abs=1e-4)
    assert found.js_divergence == pytest.approx(np.concatenate(js).mean(), abs=1e-4)
    assert found.half_widths["acceptance"] > 0
    assert sum(quartile.tokens for quartile in found.quartiles) == found.tokens


def test_the_student_is_measured_on_its_own_samples_as_it_makes_them_in_training(
    tiny_teacher: Path, student: Student
) -> None:
    config = CONFIG.model_copy(update={"max_eval_samples": 3, "generation_temperature": 0.7})
    evaluator = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, config)
    first, later = evaluator.measure(0).on_student, evaluator.measure(30).on_student
    assert first is not None
    assert first.samples == 3
    assert first == later  # the same random numbers: what differs is the student alone
    sampled = sample_completions(student, PROMPTS[:3], max_tokens=9, temperature=0.7, seed=step_seed(42, 0))
    assert [rollout.completion_ids for rollout in evaluator.student_samples()] == [
        rollout.completion_ids for rollout in sampled
    ]
    assert first.tokens == sum(len(rollout.completion_ids) for rollout in sampled)
    reseeded = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, config.model_copy(update={"seed": 43}))
    assert reseeded.measure(0).on_student != first


@pytest.mark.parametrize("change", [{"max_eval_samples": 0}, {"precompute": True}])
def test_own_samples_can_be_left_out(tiny_teacher: Path, student: Student, change: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=change)
    found = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, config, trainer=ON_POLICY).measure(0)
    assert found.on_student is None
    assert found.validation_kl == found.reverse_kl


def test_the_teachers_side_is_asked_for_once_if_it_can_be_kept(
    tiny_teacher: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"max_eval_samples": 0})
    teacher = LocalTeacher(tiny_teacher)
    asked: list[int] = []
    score = teacher.score
    teacher.score = lambda requests: asked.append(len(requests)) or score(requests)  # type: ignore[method-assign, func-returns-value]
    evaluator = Evaluator(teacher, student, PROMPTS, config)
    first, again = evaluator.measure(0), evaluator.measure(1)
    assert sum(asked) == 5
    assert again.on_teacher == first.on_teacher
    monkeypatch.setattr(tokenwise, "KEPT_BYTES", 10 * 64 * 4)
    asked.clear()
    evaluator = Evaluator(teacher, student, PROMPTS, config)
    evaluator.measure(0)
    assert evaluator.measure(1).on_teacher == first.on_teacher
    assert 5 < sum(asked) <= 10


def test_what_is_asked_ahead_is_all_that_evaluations_ask(tiny_teacher: Path, student: Student) -> None:
    config = CONFIG.model_copy(update={"precompute": True})
    for supports_hidden in (True, False):
        teacher = LocalTeacher(tiny_teacher, supports_hidden=supports_hidden)
        assert not ask_ahead(teacher, PROMPTS, config, masked_token_ids=(3,))
        assert ask_ahead(teacher, PROMPTS, config, masked_token_ids=(3,))
        known = len(teacher.known)
        Evaluator(teacher, student, PROMPTS, config, masked_token_ids=(3,)).measure(0)
        assert len(teacher.known) == known == 5


ON_POLICY = TrainerInfo("on_policy", "1", "", factory=lambda: None, on_policy=True)  # type: ignore[arg-type, return-value]
OFFLINE = TrainerInfo("offline", "1", "", factory=lambda: None)  # type: ignore[arg-type, return-value]
SFT = TrainerInfo("sft", "1", "", factory=lambda: None, uses_teacher=False)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("divergence", "options", "trainer", "expected"),
    [
        ("reverse_kl", {}, OFFLINE, "reverse_kl"),
        ("forward_kl", {}, OFFLINE, "forward_kl"),
        ("skew_forward_kl", {}, OFFLINE, "forward_kl"),
        ("skew_reverse_kl", {}, OFFLINE, "reverse_kl"),
        ("jsd", {}, OFFLINE, "js_divergence"),
        ("jsd", {"beta": 0}, OFFLINE, "forward_kl"),
        ("jsd", {"beta": 1.0}, OFFLINE, "reverse_kl"),
        ("somebody_elses", {}, OFFLINE, "js_divergence"),
        ("reverse_kl", {}, SFT, "forward_kl"),
    ],
)
def test_the_best_is_chosen_by_what_is_trained(
    tiny_teacher: Path,
    student: Student,
    divergence: str,
    options: dict[str, Any],
    trainer: TrainerInfo,
    expected: str,
) -> None:
    config = CONFIG.model_copy(update={"divergence": divergence, "divergence_options": options, "max_eval_samples": 0})
    found = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, config, trainer=trainer).measure(0)
    assert found.validation_kl == getattr(found, expected)


def test_an_on_policy_run_is_judged_on_the_students_own_samples(tiny_teacher: Path, student: Student) -> None:
    config = CONFIG.model_copy(update={"divergence": "total_variation"})
    found = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, config, trainer=ON_POLICY).measure(0)
    assert found.on_student is not None
    assert found.validation_kl == 1.0 - found.on_student.acceptance


@pytest.mark.parametrize("supports_hidden", [True, False])
def test_the_token_table_shows_what_each_model_says(
    tiny_teacher: Path, student: Student, supports_hidden: bool
) -> None:
    teacher = LocalTeacher(tiny_teacher, supports_hidden=supports_hidden)
    evaluator = Evaluator(teacher, student, PROMPTS, CONFIG)
    metrics = evaluator.measure(6)
    table = evaluator.table
    assert table is not None
    assert table.step == 6
    assert len(table.completions) == 4
    for rollout, shown in zip(evaluator.rollouts, table.completions, strict=False):
        tokens, ids = mx.array(rollout.token_ids)[None], np.array(rollout.completion_ids)[:, None]
        rows, known = slice(rollout.score_from - 1, -1), teacher.info.vocab_size
        t = log_softmax(np.array(teacher.model(tokens))[0, rows][:, :known])
        s = log_softmax(np.array(student.model(tokens))[0, rows][:, :known])
        assert shown.teacher_logprob == pytest.approx(np.take_along_axis(t, ids, -1)[:, 0], abs=1e-4)
        assert shown.student_logprob == pytest.approx(np.take_along_axis(s, ids, -1)[:, 0], abs=1e-4)
        assert shown.student_top == tuple(student.tokenizer.decode([int(token)]) for token in s.argmax(-1))
        assert shown.teacher_top == tuple(student.tokenizer.decode([token]) for token in rollout.completion_ids)
        text = student.tokenizer.decode(list(rollout.completion_ids))
        assert "".join(shown.tokens) == text.replace("\ufffd", "")
        if supports_hidden:
            assert shown.forward_kl == pytest.approx((np.exp(t) * (t - s)).sum(-1), abs=1e-4)
    curve = table.by_position
    assert sum(curve.count) == metrics.tokens
    assert np.average(curve.reverse_kl, weights=curve.count) == pytest.approx(metrics.reverse_kl, rel=1e-4)


def test_positions_are_gathered_in_bins_of_equal_width() -> None:
    values = np.arange(130, dtype=np.float32)
    curve = by_position(
        [{"forward_kl": values, "reverse_kl": 2 * values}, {"forward_kl": values[:2], "reverse_kl": values[:2]}]
    )
    assert curve.start[:3] == (0, 3, 6)
    assert curve.count == (5, *[3] * 42, 1)
    assert curve.forward_kl[:2] == (pytest.approx(4 / 5), 4.0)
    assert curve.reverse_kl[-1] == 258.0


def test_a_student_equal_to_its_teacher_is_at_zero(tiny_teacher: Path) -> None:
    same = Student.load(tiny_teacher, None, LoraConfig(rank=4), seed=0)
    found = Evaluator(LocalTeacher(tiny_teacher), same, PROMPTS, CONFIG).measure(0)
    assert abs(found.forward_kl) + abs(found.reverse_kl) + abs(found.js_divergence) < 1e-5
    assert found.agreement == found.top5_agreement == 1.0
    assert found.on_student is not None
    assert found.on_student.acceptance == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_is_rebuilt_as_the_teacher_holds_it(bits: int) -> None:
    numbers = np.random.default_rng(0)
    weight = mx.array(numbers.normal(size=(96, 64)).astype(np.float32))
    states = mx.array(numbers.normal(size=(3, 64)).astype(np.float32))
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    tensors = {"weight": np.array(packed), "scales": np.array(scales), "biases": np.array(biases)}
    head = HeadMatrix(TeacherHead(tensors, dict.fromkeys(tensors, "float32"), 32, bits), VocabularyMask(96))
    expected = states @ mx.dequantize(packed, scales, biases, group_size=32, bits=bits).T
    assert float(mx.abs(head(states) - expected).max()) < 1e-4


def test_bfloat16_travels_as_bit_patterns() -> None:
    values = mx.array([1.5, -3.25, 1e20], dtype=mx.bfloat16)
    assert mx.array_equal(as_mlx(np.array(values.view(mx.uint16)), "bfloat16"), values)
