"""Models that answer nonsense are found out before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import LoraConfig
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.live_preflight import check_models
from opd_daemon.distill.rollouts import Rollout, teacher_completions
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import CachedScores, ScoreRequest, Scores
from tests.distill.local_teacher import LocalTeacher
from tests.tiny import write_tiny_qwen2

Damage = Callable[[Scores], Scores]


@pytest.fixture
def teacher(tiny_teacher: Path) -> LocalTeacher:
    return LocalTeacher(tiny_teacher)


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return Student.load(tiny_student, None, LoraConfig(rank=2), seed=0)


@pytest.fixture
def written(teacher: LocalTeacher) -> list[Rollout]:
    prompts = [Prompt(place, "", tuple(range(10 + place, 18 + place))) for place in range(4)]
    return teacher_completions(teacher, prompts, max_tokens=12, temperature=0.0, seed=0)


def damaged(teacher: LocalTeacher, damage: Damage) -> None:
    score = teacher.score

    def worse(requests: list[ScoreRequest]) -> list[CachedScores]:
        return [replace(answer, scores=damage(answer.scores)) for answer in score(requests)]

    teacher.score = worse  # type: ignore[assignment, method-assign]


def off_by(teacher: LocalTeacher, places: int) -> None:
    """Let every row answer for the row some places before it."""
    score = teacher.score

    def shifted(requests: list[ScoreRequest]) -> list[CachedScores]:
        moved = [replace(request, candidate_ids=np.roll(request.candidate_ids, places, axis=0)) for request in requests]
        answers = [answer.scores for answer in score(moved)]
        rolled = [
            replace(entry, candidate_logprobs=np.roll(entry.candidate_logprobs, -places, axis=0)) for entry in answers
        ]
        return [CachedScores(entry, cached=False, milliseconds=0.0) for entry in rolled]

    teacher.score = shifted  # type: ignore[assignment, method-assign]


def uniform(scores: Scores) -> Scores:
    assert scores.entropies is not None
    assert scores.candidate_logprobs is not None
    even = np.float32(np.log(403))
    return replace(
        scores,
        entropies=np.full_like(scores.entropies, even),
        candidate_logprobs=np.full_like(scores.candidate_logprobs, -even),
    )


def not_a_number(scores: Scores) -> Scores:
    assert scores.entropies is not None
    return replace(scores, entropies=scores.entropies * np.float32("nan"))


def test_sound_models_pass(teacher: LocalTeacher, student: Student, written: list[Rollout]) -> None:
    check_models(teacher, student, written)


@pytest.mark.parametrize(
    ("damage", "reason", "says"),
    [
        (uniform, Reason.MODELS_UNSOUND, "equally likely"),
        (not_a_number, Reason.NOT_A_NUMBER, "numbers that are none"),
    ],
)
def test_an_unsound_teacher_is_named(
    teacher: LocalTeacher, student: Student, written: list[Rollout], damage: Damage, reason: Reason, says: str
) -> None:
    damaged(teacher, damage)
    with pytest.raises(OpdError, match=says) as caught:
        check_models(teacher, student, written)
    assert caught.value.reason is reason
    assert "teacher" in caught.value.message


@pytest.mark.parametrize(("places", "says"), [(1, "one place after"), (-1, "one place before")])
def test_a_teacher_whose_rows_are_out_of_place_is_named(
    teacher: LocalTeacher, student: Student, written: list[Rollout], places: int, says: str
) -> None:
    off_by(teacher, places)
    with pytest.raises(OpdError, match=says) as caught:
        check_models(teacher, student, written)
    assert caught.value.reason is Reason.MODELS_UNSOUND


@pytest.mark.parametrize(
    ("factor", "reason", "says"),
    [(0.0, Reason.MODELS_UNSOUND, "equally likely"), (float("nan"), Reason.NOT_A_NUMBER, "numbers that are none")],
)
def test_an_unsound_student_is_named(
    teacher: LocalTeacher, student: Student, written: list[Rollout], factor: float, reason: Reason, says: str
) -> None:
    norm = student.model.model.norm
    norm.weight = norm.weight * factor
    mx.eval(norm.weight)
    with pytest.raises(OpdError, match=f"the student.*{says}") as caught:
        check_models(teacher, student, written)
    assert caught.value.reason is reason


def test_a_student_whose_rows_are_out_of_place_is_named(
    teacher: LocalTeacher, written: list[Rollout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A head of its own: with a tied one, random weights repeat the last token forever, which no shift can change.
    folder = write_tiny_qwen2(tmp_path / "untied", seed=3, tie_word_embeddings=False)
    student = Student.load(folder, None, LoraConfig(rank=2), seed=0)
    check_models(teacher, student, written)
    states_at = student.states_at
    monkeypatch.setattr(student, "states_at", lambda tokens, places: states_at(tokens, places - 1))
    with pytest.raises(OpdError, match="out of place by one"):
        check_models(teacher, student, written)


def test_too_little_text_proves_nothing(teacher: LocalTeacher, student: Student) -> None:
    check_models(teacher, student, [])
