"""Held-out evaluation against float64 over both whole distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import LoraConfig, parse_config
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.evaluation import Evaluator
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix, as_mlx
from opd_daemon.trainer import TeacherHead
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


def test_a_teacher_without_a_head_is_compared_sparsely(tiny_teacher: Path, student: Student) -> None:
    exact = Evaluator(LocalTeacher(tiny_teacher), student, PROMPTS, CONFIG).measure(0)
    sparse = Evaluator(LocalTeacher(tiny_teacher, supports_hidden=False), student, PROMPTS, CONFIG).measure(0)
    assert not sparse.exact
    assert 0 < sparse.forward_kl <= exact.forward_kl + 1e-4
    assert 0 < sparse.reverse_kl <= exact.reverse_kl + 1e-4
    for name in ("agreement", "top5_agreement", "student_entropy", "teacher_entropy"):
        assert getattr(sparse, name) == pytest.approx(getattr(exact, name), abs=1e-4)


def test_a_student_equal_to_its_teacher_is_at_zero(tiny_teacher: Path) -> None:
    same = Student.load(tiny_teacher, None, LoraConfig(rank=4), seed=0)
    found = Evaluator(LocalTeacher(tiny_teacher), same, PROMPTS, CONFIG).measure(0)
    assert abs(found.forward_kl) + abs(found.reverse_kl) + abs(found.js_divergence) < 1e-5
    assert found.agreement == found.top5_agreement == 1.0


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
