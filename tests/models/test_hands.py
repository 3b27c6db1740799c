"""Products by two threads are the products."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

from opd_daemon.models.hands import FEWEST_WEIGHTS, MOST_OF_A_BLOCK, Array, Hands, _Job

generator = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return generator.standard_normal(shape, np.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, FEWEST_WEIGHTS), (1031, 600), (96, MOST_OF_A_BLOCK // 8)])
def test_products_are_those_of_the_weights(rows: int, shape: tuple[int, int]) -> None:
    weights, states = [normal(*shape), normal(2 * shape[0] + 1, shape[1])], normal(shape[1], rows)
    results = [np.full((len(array), rows), np.nan, np.float32) for array in weights]
    found = Hands().multiply([(w, states, r) for w, r in zip(weights, results, strict=True)], lambda: "meanwhile")
    assert found == "meanwhile"
    for array, result in zip(weights, results, strict=True):
        expected = array.astype(np.float64) @ states.astype(np.float64)
        np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())


def test_the_same_products_come_out_to_the_last_bit() -> None:
    hands, weights, states = Hands(), normal(3001, 576), normal(576, 4)
    results = [np.empty((3001, 4), np.float32) for _ in range(20)]
    for result in results:
        hands.multiply([(weights, states, result)], lambda: None)
    assert all((result == results[0]).all() for result in results)


def test_a_fault_in_a_piece_is_told_and_the_next_product_is_right() -> None:
    hands, weights, states = Hands(), normal(6, FEWEST_WEIGHTS), normal(FEWEST_WEIGHTS, 2)
    short = np.empty((4, 2), np.float32)  # the last pieces lack rows
    with pytest.raises(ValueError, match="mismatch"):
        hands.multiply([(weights, states, short)], lambda: None)
    check(hands, weights, states)


def test_a_fault_in_the_other_thread_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone does anything here."""
    monkeypatch.setattr(_Job, "work", lambda _: None)
    hands, weights, states = Hands(), normal(6, FEWEST_WEIGHTS), normal(FEWEST_WEIGHTS, 2)

    def fail(job: _Job) -> None:
        job.fault = MemoryError("no room")
        lent.set()

    lent = threading.Event()
    monkeypatch.setattr(_Job, "lend", fail)
    with pytest.raises(MemoryError, match="no room"):
        hands.multiply([(weights, states, np.empty((6, 2), np.float32))], lambda: lent.wait(10))


def test_what_fails_meanwhile_leaves_no_answer_behind() -> None:
    hands, weights, states = Hands(), normal(6, FEWEST_WEIGHTS), normal(FEWEST_WEIGHTS, 2)
    with pytest.raises(ZeroDivisionError):
        hands.multiply([(weights, states, np.empty((6, 2), np.float32))], lambda: 1 // 0)
    check(hands, weights, states)


def check(hands: Hands, weights: Array, states: Array) -> None:
    result = np.empty((len(weights), states.shape[1]), np.float32)
    hands.multiply([(weights, states, result)], lambda: None)
    np.testing.assert_allclose(result, weights @ states, atol=1e-5 * np.abs(result).max())


def test_the_thread_ends_with_its_owner() -> None:
    before = set(threading.enumerate())
    hands = Hands()
    (thread,) = set(threading.enumerate()) - before
    del hands
    gc.collect()
    began = time.monotonic()
    while thread.is_alive():
        assert time.monotonic() - began < 10
        time.sleep(0.01)
