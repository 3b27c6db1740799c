"""Means over tokens and their uncertainty over completions."""

from __future__ import annotations

import numpy as np
import pytest

from opd_daemon.distill.confidence import Values, quarters, ratio, summarise, t_quantile
from opd_daemon.distill.exact import NAMES


def completion(values: list[float]) -> Values:
    return {name: np.array(values, dtype=np.float32) for name in NAMES}


# Two-sided 95 % points, from the tables.
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (49, 2.0096), (5000, 1.9604)],
)
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_long_completions_weigh_by_their_tokens() -> None:
    found = summarise([completion([1.0] * 9), completion([2.0])])
    assert found.forward_kl == pytest.approx(1.1)
    assert (found.tokens, found.samples) == (10, 2)


def test_completions_of_one_length_have_the_interval_of_their_means() -> None:
    means = np.array([1.0, 2.0, 4.0, 7.0])
    found = summarise([completion([mean - 0.5, mean + 0.5]) for mean in means])
    assert found.half_widths["agreement"] == pytest.approx(3.1824 * means.std(ddof=1) / 2, rel=1e-4)
    assert found.half_widths.keys() == set(NAMES)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        lengths = draw.integers(5, 60, size=25)
        # Completions differ in level, and longer ones are worse: what an interval over tokens would miss.
        sums = np.array([draw.normal(1.0 + 0.01 * length + draw.normal(0, 0.3), 0.1) * length for length in lengths])
        truth = 1.0 + 0.01 * (np.arange(5, 60) ** 2).sum() / np.arange(5, 60).sum()
        mean, half_width = ratio(sums, lengths.astype(np.float64))
        assert half_width is not None
        covered += abs(mean - truth) <= half_width
    assert 0.92 < covered / 2000 < 0.97


def test_one_completion_has_no_interval() -> None:
    found = summarise([completion([1.0, 3.0])])
    assert found.forward_kl == 2.0
    assert found.half_widths == {}


def test_quarters_are_of_the_completions_own_length() -> None:
    assert quarters(8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert quarters(6).tolist() == [0, 0, 1, 2, 2, 3]
    assert quarters(1).tolist() == [0]
    found = summarise([completion([1, 2, 3, 4]), completion([10, 10, 20, 20, 30, 30, 40, 40])])
    assert [quartile.reverse_kl for quartile in found.quartiles] == [7.0, 14.0, 21.0, 28.0]
    assert [quartile.tokens for quartile in found.quartiles] == [3, 3, 3, 3]
    assert found.quartiles[0].quartiles == ()


def test_a_quarter_no_completion_reaches_is_empty() -> None:
    found = summarise([completion([1.0]), completion([3.0])])
    assert [quartile.samples for quartile in found.quartiles] == [2, 0, 0, 0]
    assert found.quartiles[3].forward_kl == 0.0
    assert found.quartiles[3].half_widths == {}
