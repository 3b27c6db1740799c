"""Reductions over a vocabulary against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.distill import exact, logits
from opd_daemon.distill.logits import IMPOSSIBLE, VocabularyMask

WIDTHS = (333, 4096, 49_152, 151_936)


def some_logits(width: int, rows: int = 5) -> mx.array:
    return mx.array(np.random.default_rng(width).normal(size=(rows, width)).astype(np.float32) * 4)


def exact_logprobs(values: mx.array) -> Any:
    wide = np.array(values, dtype=np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_logsumexp_is_unbiased(width: int) -> None:
    values = some_logits(width)
    found = np.array(values - logits.logsumexp(values), dtype=np.float64)
    assert np.abs(found - exact_logprobs(values)).max() < 5e-6


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_entropy_is_exact(width: int, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "on_host", lambda: host)
    values = VocabularyMask(width, range(5))(some_logits(width))
    wide = exact_logprobs(values)[:, 5:]
    assert np.array(logits.entropy(values)) == pytest.approx(-(np.exp(wide) * wide).sum(-1), abs=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 5, 64])
def test_top_ids_are_those_of_a_full_sort(width: int, count: int) -> None:
    values = some_logits(width)
    expected = np.argsort(-np.array(values), axis=-1, kind="stable")[:, :count]
    assert (np.array(logits.top_ids(values, count)) == expected).all()


def test_top_ids_of_more_than_there_are_is_everything() -> None:
    values = some_logits(20)
    assert (np.sort(np.array(logits.top_ids(values, 64)), -1) == np.arange(20)).all()


def test_log1mexp_is_right_at_both_ends() -> None:
    mass = np.array([-1e-6, -1e-3, -0.5, -0.7, -5.0, -30.0], dtype=np.float32)
    expected = np.log(-np.expm1(mass.astype(np.float64)))
    assert np.array(logits.log1mexp(mx.array(mass))) == pytest.approx(expected, rel=1e-5)
    assert float(logits.log1mexp(mx.array(0.0))) == -np.inf


def test_masked_ids_and_padding_get_no_mass() -> None:
    mask = VocabularyMask(300, [0, 299, 5, 800])
    found = mask(some_logits(333))
    assert found.shape == (5, 300)
    assert (np.array(found)[:, [0, 5, 299]] == np.float32(IMPOSSIBLE)).all()
    assert mask.hidden_ids == (0, 5, 299)


@pytest.mark.parametrize("host", [True, False])
def test_full_vocabulary_comparison_is_exact(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "on_host", lambda: host)
    mask = VocabularyMask(4000, [1, 3999])
    teacher, student = mask(some_logits(4096, 20)), mask(some_logits(4097, 20))
    found = exact.compare(teacher, student)
    kept = np.setdiff1d(np.arange(4000), [1, 3999])
    t, s = exact_logprobs(teacher)[:, kept], exact_logprobs(student)[:, kept]
    middle = np.log((np.exp(t) + np.exp(s)) / 2)
    best = t.argmax(-1)[:, None]
    rank = (s > np.take_along_axis(s, best, -1)).sum(-1)
    expected = {
        "forward_kl": (np.exp(t) * (t - s)).sum(-1),
        "reverse_kl": (np.exp(s) * (s - t)).sum(-1),
        "js_divergence": ((np.exp(t) * (t - middle)).sum(-1) + (np.exp(s) * (s - middle)).sum(-1)) / 2,
        "teacher_entropy": -(np.exp(t) * t).sum(-1),
        "student_entropy": -(np.exp(s) * s).sum(-1),
        "agreement": rank == 0,
        "top5_agreement": rank < 5,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.astype(float), abs=3e-5), name
