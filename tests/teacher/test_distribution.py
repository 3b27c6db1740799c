"""Both forms of the vocabulary arithmetic against float64, on shapes the tiny models don't have."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.teacher.distribution import Arrays, describe, describe_on_device
from opd_daemon.types import ScoreWants

Describe = Callable[..., Arrays]
WANTS = ScoreWants(token_stats=True, top_k=64, log_z_temperatures=(0.25, 3.0))


def logits_of(rows: int, vocab: int, scale: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((rows, vocab)) * scale).astype(np.float32)


@pytest.mark.parametrize("form", [describe, describe_on_device])
@pytest.mark.parametrize(("vocab", "scale"), [(49152, 1.0), (49152, 6.0), (151_665, 3.0), (100, 2.0), (64, 30.0)])
def test_both_forms_are_exact_at_real_widths(form: Describe, vocab: int, scale: float) -> None:
    logits = logits_of(11, vocab, scale)
    ids = np.arange(11, dtype=np.int32) * 5
    candidates = np.tile(np.array([[3, 3, -1, 9]], np.int32), (11, 1))
    blocked = np.array([17, vocab - 1], np.int32)
    found = form(mx.array(logits), ids, candidates, WANTS, blocked)

    exact = logits.astype(np.float64)
    exact[:, blocked] = -np.inf
    exact -= np.logaddexp.reduce(exact, axis=-1, keepdims=True)
    rows = np.arange(11)
    best = np.argsort(-exact, axis=-1)[:, :64]
    live = ~np.isneginf(np.take_along_axis(exact, best, 1))
    close = {"atol": 2e-5, "rtol": 1e-5}
    np.testing.assert_array_equal(np.where(live, found["top_ids"], -1), np.where(live, best, -1))
    np.testing.assert_allclose(found["top_logprobs"], np.take_along_axis(exact, best, 1), **close)
    np.testing.assert_allclose(found["token_logprobs"], exact[rows, ids], **close)
    np.testing.assert_array_equal(found["ranks"], (exact > exact[rows, ids, None]).sum(-1))
    entropies = -(np.exp(exact) * np.maximum(exact, -1e9)).sum(-1)
    np.testing.assert_allclose(found["entropies"], entropies, **close)
    for column, temperature in enumerate(WANTS.log_z_temperatures):
        wanted = np.logaddexp.reduce(exact / temperature, axis=-1)
        np.testing.assert_allclose(found["log_z"][:, column], wanted, **close)
    check_tail(found["top_tail"], exact, best)
    check_tail(found["candidate_tail"], exact, np.tile([3, 9], (11, 1)))


def check_tail(found: np.ndarray, exact: np.ndarray, ids: np.ndarray) -> None:
    rest = exact.copy()
    np.put_along_axis(rest, ids, -np.inf, 1)
    np.testing.assert_allclose(found, np.logaddexp.reduce(rest, axis=-1), atol=1e-4, rtol=1e-5)


def test_a_tiny_tail_keeps_its_precision() -> None:
    logits = np.full((1, 4096), -18.0, np.float32)
    logits[0, 5] = 0.0
    found = describe(mx.array(logits), np.array([5], np.int32), np.zeros((1, 0), np.int32), ScoreWants(top_k=1), ())
    rest = 4095 * np.exp(-18.0)
    np.testing.assert_allclose(found["top_tail"], np.log(rest / (1 + rest)), rtol=1e-6)
