"""Exact reductions over a vocabulary: log-sum-exp, entropy, most likely ids, and masks of ids that don't exist.

All functions take float32 logits `(N, V)`. On x86, MLX's `exp` takes twenty times as long as numpy's and its float32
reductions over a whole vocabulary row are biased by up to 2e-4 nats. So on a CPU these functions compute in numpy, a
few rows at a time so that they stay in the processor's cache, on as many threads as there are processors (numpy lets
them run side by side); elsewhere they reduce in two levels, over blocks of the row and then over the blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Float32, Int32

# Stands for the logit of an impossible outcome: exp gives an exact 0, and no arithmetic on it gives NaN as −inf would.
IMPOSSIBLE = -1e30

REDUCTION_BLOCK = 256
SELECTION_BLOCK = 32
TILE_ELEMENTS = 160_000
THREADED_ELEMENTS = 1 << 20
MOST_THREADS = 8


def on_host() -> bool:
    """Whether MLX computes on the CPU, where numpy is the faster one for everything but matrix products."""
    return mx.default_device() == mx.Device(mx.cpu)


def over_tiles(function: Callable[[slice], None], rows: int, width: int) -> None:
    """Call a function that works on some rows of numpy arrays for all of them, a tile at a time, on several threads.

    The tiles depend on the width alone, so results don't depend on the number of threads.
    """
    size = max(1, TILE_ELEMENTS // width)
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    each = _threads().map if rows * width >= THREADED_ELEMENTS else map
    for _ in each(function, tiles):
        pass


@cache
def _threads() -> ThreadPoolExecutor:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(processors, MOST_THREADS), "rows")


def in_tiles(function: Callable[..., Float32], *arrays: Any, width: int) -> mx.array:
    """Apply a numpy function of rows to a tile of rows at a time; its results, of that width, joined: `(N, width)`."""
    hosts = [np.asarray(array) for array in arrays]
    joined = mx.zeros((len(hosts[0]), width))
    view = host_view(joined)

    def tile(rows: slice) -> None:
        view[rows] = function(*(host[rows] for host in hosts))

    over_tiles(tile, *hosts[0].shape)
    return joined


def host_view(array: mx.array) -> Float32:
    """The memory of a float32 array as numpy sees it: writing to it changes the array."""
    mx.eval(array)
    view: Float32 = np.asarray(array)
    return view


@dataclass(frozen=True, slots=True)
class Arrays:
    """The library that formulas compute with, and the operations on rows in which numpy and MLX differ.

    row_sum: `(N, V)` → `(N, 1)`. row_dot: the sum of products of two `(N, V)`. row_count: how many are true.
    add_at: add amounts `(N, 1)` to one place `(N, 1)` of every row.
    """

    lib: Any
    row_sum: Callable[[Any], Any]
    row_dot: Callable[[Any, Any], Any]
    row_count: Callable[[Any], Any]
    add_at: Callable[[Any, Any, Any], Any]


def logsumexp(logits: mx.array) -> mx.array:
    """Log of the summed exponentials of every row: `(N, V)` → `(N, 1)`, right to a few 1e-6."""
    blocks = _in_blocks(logits, REDUCTION_BLOCK, IMPOSSIBLE)
    return mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1, keepdims=True)


def row_sum(values: mx.array) -> mx.array:
    """Sum of every row: `(N, V)` → `(N, 1)`."""
    return _in_blocks(values, REDUCTION_BLOCK, 0.0).sum(axis=-1).sum(axis=-1, keepdims=True)


def entropy(logits: mx.array) -> mx.array:
    """Entropy in nats of every row's distribution: `(N, V)` → `(N,)`."""
    if on_host():
        return in_tiles(_host_entropy, logits, width=1)[:, 0]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    total = row_sum(weights)
    return (mx.log(total) - row_sum(weights * shifted) / total)[:, 0]


def log1mexp(log_mass: mx.array) -> mx.array:
    """Log of `1 − exp(log_mass)` without cancellation at either end (Mächler 2012); −inf where the mass is 1."""
    log_mass = mx.minimum(log_mass, 0.0)
    return mx.where(log_mass > -0.6931472, mx.log(-mx.expm1(log_mass)), mx.log1p(-mx.exp(log_mass)))


def top_ids(logits: mx.array, count: int) -> mx.array:
    """Ids of the `count` largest logits, largest first: `(N, V)` → `(N, count)` int32.

    The `count` blocks with the largest maxima surely hold the `count` largest logits, so only those are searched.
    """
    rows, width = logits.shape
    if width <= 2 * count * SELECTION_BLOCK:
        return _descending(logits, _any_top(logits, count))
    blocks = _in_blocks(logits, SELECTION_BLOCK, IMPOSSIBLE)
    best_blocks = _any_top(blocks.max(axis=-1), count)
    places = best_blocks[:, :, None] * SELECTION_BLOCK + mx.arange(SELECTION_BLOCK, dtype=mx.int32)
    places = places.reshape(rows, -1)
    candidates = mx.take_along_axis(blocks.reshape(rows, -1), places, axis=-1)
    ids = mx.take_along_axis(places, _any_top(candidates, count), axis=-1)
    return _descending(logits, ids)


class VocabularyMask:
    """Gives ids that no token stands for an impossible logit.

    width: number of columns kept, so that two models of one tokenizer with differently padded heads meet.
    hidden: ids below the width that get no mass.
    """

    def __init__(self, width: int, hidden: Iterable[int] = ()) -> None:
        self.width = width
        self.hidden_ids = tuple(sorted({index for index in hidden if 0 <= index < width}))
        hides = np.zeros(width, dtype=np.bool_)
        hides[list(self.hidden_ids)] = True
        self._hides = mx.array(hides)

    def __call__(self, logits: mx.array) -> mx.array:
        """Mask logits `(…, V)` with V ≥ width; returns float32 `(…, width)`."""
        logits = logits[..., : self.width].astype(mx.float32)
        return mx.where(self._hides, IMPOSSIBLE, logits) if self.hidden_ids else logits


def _host_entropy(logits: Float32) -> Float32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1, keepdims=True)
    shifted *= weights
    result: Float32 = np.log(total) - shifted.sum(axis=-1, keepdims=True) / total
    return result


def _host_add_at(values: Float32, places: Int32, amounts: Float32) -> Float32:
    values[np.arange(len(values)), places[:, 0]] += amounts[:, 0]
    return values


def _device_add_at(values: mx.array, places: mx.array, amounts: mx.array) -> mx.array:
    return mx.put_along_axis(values, places, mx.take_along_axis(values, places, axis=-1) + amounts, axis=-1)


def _host_row_sum(values: Float32) -> Float32:
    total: Float32 = values.sum(axis=-1, keepdims=True)
    return total


def _host_row_dot(left: Float32, right: Float32) -> Float32:
    # By blocks, since one long float32 sum loses digits.
    count, width = left.shape
    whole = width - width % REDUCTION_BLOCK
    blocks = (count, -1, REDUCTION_BLOCK)
    total: Float32 = np.vecdot(left[:, :whole].reshape(blocks), right[:, :whole].reshape(blocks)).sum(axis=-1)
    total += np.vecdot(left[:, whole:], right[:, whole:])
    return total[:, None]


def _device_row_dot(left: mx.array, right: mx.array) -> mx.array:
    return row_sum(left * right)


def _host_row_count(flags: npt.NDArray[np.bool_]) -> Float32:
    # With an axis, numpy counts by adding integers.
    return np.array([[np.count_nonzero(row)] for row in flags], np.float32)


def _device_row_count(flags: mx.array) -> mx.array:
    return row_sum(flags.astype(mx.float32))


def _in_blocks(values: mx.array, size: int, filler: float) -> mx.array:
    rows, width = values.shape
    while size > SELECTION_BLOCK and width % size:
        size //= 2
    if lacking := -width % size:
        values = mx.concatenate([values, mx.full((rows, lacking), filler, dtype=values.dtype)], axis=-1)
    return values.reshape(rows, -1, size)


def _any_top(values: mx.array, count: int) -> mx.array:
    width = values.shape[-1]
    if count >= width:
        return mx.broadcast_to(mx.arange(width, dtype=mx.int32), values.shape)
    return mx.argpartition(-values, kth=count - 1, axis=-1)[:, :count].astype(mx.int32)


def _descending(logits: mx.array, ids: mx.array) -> mx.array:
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


HOST = Arrays(np, _host_row_sum, _host_row_dot, _host_row_count, _host_add_at)
DEVICE = Arrays(mx, row_sum, _device_row_dot, _device_row_count, _device_add_at)
