"""The expected time left: honest while completions are made ahead."""

from __future__ import annotations

import pytest

from opd_daemon.distill.pace import Pace


def test_even_steps_are_expected_to_go_on() -> None:
    pace = Pace()
    for _ in range(5):
        pace.step(3.0, 2.0)
    pace.evaluation(10.0)
    assert pace.seconds(steps=4, rollouts=4, evaluations=2) == pytest.approx(4 * 3.0 + 20.0)


def test_completions_made_ahead_are_neither_a_spike_nor_free() -> None:
    pace = Pace()
    expected = []
    for _ in range(3):
        pace.step(9.0, 8.0, steps_made=4)
        for _ in range(3):
            pace.step(1.0, 0.0)
            expected.append(pace.seconds(steps=10, rollouts=10, evaluations=0))
    assert expected == pytest.approx([10 * (1.0 + 2.0)] * 9)


def test_steps_whose_completions_are_known_cost_only_the_rest() -> None:
    pace = Pace()
    pace.step(9.0, 8.0, steps_made=4)
    assert pace.steps_ahead == 3
    assert pace.seconds(steps=10, rollouts=2, evaluations=0) == pytest.approx(10 * 1.0 + 2 * 2.0)


def test_the_first_evaluation_is_not_taken_as_the_rule() -> None:
    pace = Pace()
    pace.evaluation(30.0)
    pace.evaluation(4.0)
    assert pace.seconds(steps=0, rollouts=0, evaluations=3) == pytest.approx(12.0)


def test_nothing_is_expected_before_anything_was_measured() -> None:
    assert Pace().seconds(steps=10, rollouts=10, evaluations=3) == 0.0


def test_steps_that_alternate_change_nothing() -> None:
    pace = Pace()
    left = []
    for number in range(1, 9):
        pace.step(4.0 if number % 2 else 2.0, 0.0)
        left.append(pace.seconds(20 - number, 0, 0))
    assert left[1:] == [3.0 * (20 - number) for number in range(2, 9)]


def test_what_the_first_step_does_once_is_not_expected_again() -> None:
    pace = Pace()
    pace.step(20.0, 0.0)
    for _ in range(2):
        pace.step(4.0, 0.0)
    assert pace.seconds(steps=10, rollouts=10, evaluations=0) == pytest.approx(40.0)
