"""Products of many weights with a few rows, by two threads at the speed of memory.

A BLAS packs a large factor before it multiplies: with a few rows the packing takes longer than the product. Blocks too
small for OpenBLAS's threads are not packed where it has kernels for small products (AVX-512), and two threads of ours,
which share the blocks, read memory about as fast as it goes (`bench/decoding.py`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
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
# Fewer weights are not worth a second thread, nor smaller blocks their calls.
FEWEST_WEIGHTS = 1 << 17
SMALLEST_BLOCK = 8
# More of them even out what two threads do, and cost more turns of the interpreter's lock.
PIECES = 4


class Hands:
    """Does products together with a thread of its own, which ends with it. For one thread at a time."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[_Job | None] = SimpleQueue()
        self._at_work = threading.Lock()
        threading.Thread(target=_lend, args=(self._asked, self._at_work), name="products", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def multiply(self, products: Sequence[Product], meanwhile: Callable[[], T]) -> T:
        """For weights (M, K), states (K, B) and a result (M, B), each contiguous: write the product to the result.

        meanwhile: something small to do while the other thread may not be done; what it returns.
        """
        rows = products[0][1].shape[1]
        if not FEWEST_ROWS <= rows <= MOST_ROWS or sum(weights.size for weights, _, _ in products) < FEWEST_WEIGHTS:
            for weights, states, result in products:
                np.matmul(weights, states, out=result)
            return meanwhile()
        job = _Job(products)
        self._asked.put(job)
        job.work()
        found = meanwhile()
        with self._at_work:  # the other thread's last piece; there may be none
            pass
        if job.fault:
            raise job.fault
        return found


class _Job:
    """Pieces of products, each done by whoever comes first: a thread that is woken late delays nobody."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.fault: BaseException | None = None
        self._pieces: deque[Product] = deque()
        for weights, states, result in products:
            step = -(-len(weights) // PIECES)
            self._pieces += [
                (weights[start : start + step], states, result[start : start + step])
                for start in range(0, len(weights), step)
            ]

    def work(self) -> None:
        """Do pieces until none is left."""
        while True:
            try:
                piece = self._pieces.popleft()
            except IndexError:
                return
            _in_blocks(*piece)

    def lend(self) -> None:
        """As `work`; what goes wrong is kept for the one who waits."""
        try:
            self.work()
        except BaseException as fault:  # noqa: BLE001
            self.fault = fault


def _lend(asked: SimpleQueue[_Job | None], at_work: threading.Lock) -> None:
    while (job := asked.get()) is not None:
        with at_work:
            job.lend()
        del job  # while nothing is asked for, no weights are held


def _in_blocks(weights: Array, states: Array, result: Array) -> None:
    rows = max(1, MOST_OF_A_BLOCK // states.size)
    whole = len(weights) // rows * rows
    if rows < SMALLEST_BLOCK or whole < 2 * rows:
        np.matmul(weights, states, out=result)
        return
    blocks = weights[:whole].reshape(-1, rows, weights.shape[1])
    np.matmul(blocks, states, out=result[:whole].reshape(-1, rows, states.shape[1]))
    if whole < len(weights):
        np.matmul(weights[whole:], states, out=result[whole:])
