"""Products of many weights with a few rows, by two threads at the speed of memory.

A BLAS packs a large factor before it multiplies: with a few rows the packing takes longer than the product. Blocks too
small for OpenBLAS's threads are not packed where it has kernels for small products (AVX-512), and two threads of ours,
each with half of the blocks, read memory about as fast as it goes (`bench/decoding.py`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Product = tuple[Array, Array, Array]
T = TypeVar("T")

# Multiplications from which on OpenBLAS takes all its threads (its GEMM_MULTITHREAD_THRESHOLD, 4, times 65 536).
MOST_OF_A_BLOCK = 1 << 18
# One row is a product of another kind, and from here on packing pays.
FEWEST_ROWS, MOST_ROWS = 2, 8
# Smaller blocks are not worth their calls.
SMALLEST_BLOCK = 8


class Hands:
    """Does products, half of each in a thread of its own, which ends with it. For one thread at a time."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Sequence[Product] | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=_lend, args=(self._asked, self._done), name="products", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def multiply(self, products: Sequence[Product], meanwhile: Callable[[], T]) -> T:
        """For weights (M, K), states (K, B) and a result (M, B), each contiguous: write the product to the result.

        meanwhile: something small to do while the other thread is not done; what it returns.
        """
        if not FEWEST_ROWS <= products[0][1].shape[1] <= MOST_ROWS:
            for weights, states, result in products:
                np.matmul(weights, states, out=result)
            return meanwhile()
        halves = [len(weights) // 2 for weights, _, _ in products]
        self._asked.put([(w[half:], states, r[half:]) for half, (w, states, r) in zip(halves, products, strict=True)])
        try:
            for half, (weights, states, result) in zip(halves, products, strict=True):
                _in_blocks(weights[:half], states, result[:half])
            found = meanwhile()
        finally:
            fault = self._done.get()
        if fault:
            raise fault
        return found


def _lend(asked: SimpleQueue[Sequence[Product] | None], done: SimpleQueue[BaseException | None]) -> None:
    while (products := asked.get()) is not None:
        fault = _fault_of(products)
        del products  # while nothing is asked for, no weights are held
        done.put(fault)


def _fault_of(products: Sequence[Product]) -> BaseException | None:
    """Do them; what went wrong, for the one who waits."""
    try:
        for product in products:
            _in_blocks(*product)
    except BaseException as fault:  # noqa: BLE001
        return fault
    return None


def _in_blocks(weights: Array, states: Array, result: Array) -> None:
    rows = MOST_OF_A_BLOCK // states.size
    if rows < SMALLEST_BLOCK or len(weights) <= rows:
        np.matmul(weights, states, out=result)
        return
    whole = len(weights) // rows * rows
    blocks = weights[:whole].reshape(-1, rows, weights.shape[1])
    np.matmul(blocks, states, out=result[:whole].reshape(-1, rows, states.shape[1]))
    if whole < len(weights):
        np.matmul(weights[whole:], states, out=result[whole:])
