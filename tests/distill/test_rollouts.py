"""Sampling: independent of the company, repeatable, with EOS kept; and the log of it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import LoraConfig
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.rollouts import (
    Rollout,
    RolloutLog,
    forget_after,
    read_log,
    read_rollouts,
    reference_completions,
    sample_completions,
    teacher_completions,
)
from opd_daemon.distill.student import Student
from tests.distill.local_teacher import LocalTeacher


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Student:
    return Student.load(tiny_student, None, LoraConfig(rank=4), seed=0)


def prompts(*lengths: int) -> list[Prompt]:
    numbers = np.random.default_rng(5)
    return [Prompt(i, f"p{i}", tuple(numbers.integers(0, 400, length).tolist())) for i, length in enumerate(lengths)]


def sample(student: Student, asked: list[Prompt], **changes: object) -> list[Rollout]:
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 1, **changes}
    return sample_completions(student, asked, **settings)  # type: ignore[arg-type]


def test_greedy_is_what_whole_forwards_say(student: Student) -> None:
    asked = prompts(5, 3, 9)
    for rollout in sample(student, asked, temperature=0.0):
        logits = student.logits(mx.array(rollout.token_ids)[None])[0, rollout.score_from - 1 : -1]
        assert tuple(mx.argmax(logits, axis=-1).tolist()) == rollout.completion_ids


def test_the_seed_decides_and_each_place_has_its_own_numbers(student: Student) -> None:
    twins = prompts(4, 4)
    twins[1] = Prompt(1, "", twins[0].token_ids)
    first, second = sample(student, twins), sample(student, twins)
    assert [r.completion_ids for r in first] == [r.completion_ids for r in second]
    assert first[0].completion_ids != first[1].completion_ids
    assert sample(student, twins, seed=2)[0].completion_ids != first[0].completion_ids


def test_a_completion_does_not_depend_on_its_company(student: Student) -> None:
    asked = prompts(4, 11, 2)
    together = sample(student, asked)
    assert together[0].completion_ids == sample(student, asked[:1])[0].completion_ids


def test_behaviour_logprobs_are_the_students_at_temperature_1(student: Student) -> None:
    for rollout in sample(student, prompts(5, 3), temperature=0.7):
        logits = student.logits(mx.array(rollout.token_ids)[None])[0, rollout.score_from - 1 : -1]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        expected = logprobs[np.arange(len(logprobs)), rollout.completion_ids]
        np.testing.assert_allclose(rollout.behaviour_logprobs, expected, atol=1e-4)


def test_a_completion_that_goes_round_in_circles_is_ended(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = mx.full((student.width,), -100.0)
    logits[7] = 100.0
    monkeypatch.setattr(student, "vocabulary", lambda rows: mx.broadcast_to(logits, (rows.shape[0], student.width)))
    (ended,) = sample(student, prompts(3), max_tokens=60, repetition_guard=4)
    assert (ended.stopped, len(ended.completion_ids)) == ("repetition", 16)
    (unguarded,) = sample(student, prompts(3), max_tokens=60)
    assert unguarded.stopped == "length"


def test_every_eos_ends_a_completion_and_stays_in_it(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    (asked,) = prompts(3)
    plain = sample(student, [asked], temperature=0.0)[0]
    assert not plain.finished
    third = plain.completion_ids[2]
    length = plain.completion_ids.index(third) + 1
    monkeypatch.setattr(student, "eos_ids", (*student.eos_ids, third))
    ended = sample(student, [asked], temperature=0.0)[0]
    assert ended.finished
    assert ended.completion_ids == plain.completion_ids[:length]


def test_support_is_the_likeliest_ids_of_the_training_forward(student: Student) -> None:
    for rollout in sample(student, prompts(5, 3), support=8):
        assert rollout.support_ids is not None
        logits = student.logits(mx.array(rollout.token_ids)[None])[0, rollout.score_from - 1 : -1]
        expected = np.argsort(-np.array(logits), axis=-1)[:, :8]
        assert (rollout.support_ids == expected).mean() > 0.95
        assert rollout.support_ids.shape == (len(rollout.completion_ids), 8)


def test_teacher_completions_are_the_same_in_every_epoch(tiny_teacher: Path) -> None:
    teacher, asked = LocalTeacher(tiny_teacher), prompts(5, 3)
    first = teacher_completions(teacher, asked, max_tokens=6, temperature=1.0, seed=3)
    second = teacher_completions(teacher, asked[::-1], max_tokens=6, temperature=1.0, seed=3)
    assert [r.completion_ids for r in first] == [r.completion_ids for r in second[::-1]]


def test_references_are_cut_at_the_limit() -> None:
    asked = [Prompt(0, "", (1,), (5, 6, 7)), Prompt(1, "", (1,), (5, 6, 7, 8))]
    first, second = reference_completions(asked, 3)
    assert (first.completion_ids, first.stopped) == ((5, 6, 7), "stop")
    assert (second.completion_ids, second.stopped) == ((5, 6, 7), "length")


def test_the_log_forgets_later_steps_and_survives_a_cut_line(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "log.jsonl", str)
    (asked,) = prompts(3)
    for step in (1, 2, 3):
        log.append(step, [Rollout(asked, (step, 9), stopped="stop", source="teacher")])
    with log.path.open("a") as file:
        file.write('{"step": 4, "pro')
    forget_after(log.path, 2)
    assert [row["step"] for row in read_log(log.path)] == [1, 2]
    (again,) = read_rollouts(log.path, {0: asked})
    assert again.completion_ids == (2, 9)
