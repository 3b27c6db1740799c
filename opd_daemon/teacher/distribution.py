"""Everything asked about next-token distributions, computed from rows of logits.

Two forms of one interface. `HostRows` works in numpy, a few rows at a time so that they stay in the processor's cache:
on x86, MLX's single-threaded `exp` takes 13 times as long as numpy's and its sums over a whole row are biased.
`DeviceRows` stays on the GPU. Both subtract the row's maximum first, s = z − max z, with Z = Σ exp s, and find the
top k by block maxima: the k blocks with the largest maxima contain the k largest entries, so only those are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Float32, Int32
from opd_daemon.types import ScoreWants

# Finite, because 0 · −inf would turn the entropy into NaN; entries below EXCLUDED become −inf in results.
MASKED = -1e30
PADDING = -2e30
EXCLUDED = -1e29

BLOCK = 32
SUM_WIDTH = 256
HOST_TILE_ROWS = 8

A = TypeVar("A", Float32, mx.array)
Arrays = dict[str, npt.NDArray[Any]]


class Rows(Protocol[A]):
    """Distributions (R, V) that answer per row; ids of −1 stand for no token. log_total (R,) is log Z."""

    log_total: A

    def logprobs(self, ids: A) -> A:
        """Log-probabilities of ids (R, C)."""

    def ranks(self, ids: A) -> A:
        """Number of tokens more likely than each row's token (R, 1)."""

    def entropies(self) -> A:
        """Entropy in nats (R,)."""

    def top(self, count: int) -> tuple[A, A]:
        """Ids and log-probabilities (R, count), most likely first."""

    def tail(self, ids: A) -> A:
        """Log of the mass outside the set of ids (R, C) of each row; repeated ids count once."""

    def log_z(self, temperatures: Sequence[float]) -> A:
        """Log of Σ exp(logprob / T) for each row and temperature (R, temperatures)."""


class HostRows:
    """Rows in numpy; made for a small tile."""

    def __init__(self, logits: Float32, masked: Int32) -> None:
        rows, self.size = logits.shape
        width = _width(self.size, BLOCK)
        self.shifted = np.full((rows, width), PADDING, np.float32)
        self.shifted[:, : self.size] = logits
        if len(masked):
            self.shifted[:, masked] = MASKED
        self.shifted -= self.shifted.max(-1, keepdims=True)
        self.weights = np.exp(self.shifted)
        self.total = self.weights.sum(-1)
        self.log_total = np.log(self.total)

    def logprobs(self, ids: Int32) -> Float32:
        """As `Rows.logprobs`."""
        picked = np.take_along_axis(self.shifted, self._columns(ids), 1) - self.log_total[:, None]
        return np.where((ids < 0) | (picked < EXCLUDED), -np.inf, picked).astype(np.float32)

    def ranks(self, ids: Int32) -> Int32:
        """As `Rows.ranks`."""
        larger = np.count_nonzero(self.shifted > np.take_along_axis(self.shifted, ids, 1), axis=-1)
        return np.asarray(larger, np.int32)

    def entropies(self) -> Float32:
        """As `Rows.entropies`."""
        shape = (len(self.total), BLOCK, -1)
        partial = np.einsum("ijk,ijk->ij", self.weights.reshape(shape), self.shifted.reshape(shape))
        return np.asarray(np.maximum(self.log_total - partial.sum(-1) / self.total, 0), np.float32)

    def top(self, count: int) -> tuple[Int32, Float32]:
        """As `Rows.top`."""
        blocks = self.shifted.reshape(len(self.total), BLOCK, -1)
        width = blocks.shape[-1]
        chosen = _largest(blocks.max(1), min(count, width))
        values = np.take_along_axis(blocks, chosen[:, None, :], 2).reshape(len(blocks), -1)
        ids = (np.arange(BLOCK)[:, None] * width + chosen[:, None, :]).reshape(len(blocks), -1)
        best = _largest(values, count)
        values, ids = np.take_along_axis(values, best, 1), np.take_along_axis(ids, best, 1)
        order = np.lexsort((ids, -values), axis=-1)
        ids = np.take_along_axis(ids, order, 1).astype(np.int32)
        return ids, self.logprobs(ids)

    def tail(self, ids: Int32) -> Float32:
        """As `Rows.tail`."""
        columns = self._columns(ids)
        kept = np.take_along_axis(self.weights, columns, 1)
        np.put_along_axis(self.weights, columns, 0, 1)
        rest = self.weights.sum(-1)
        np.put_along_axis(self.weights, columns, kept, 1)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(rest) - self.log_total, np.float32)

    def log_z(self, temperatures: Sequence[float]) -> Float32:
        """As `Rows.log_z`."""
        columns = [np.log(np.exp(self.shifted / t).sum(-1)) - self.log_total / t for t in map(np.float32, temperatures)]
        return np.stack(columns, 1)

    def _columns(self, ids: Int32) -> Int32:
        # The column behind the last token is padding: no mass, harmless to read and to overwrite.
        return np.where(ids < 0, self.size, ids)


class DeviceRows:
    """Rows as MLX arrays, lazily; sums go in two levels, which is unbiased on every backend."""

    def __init__(self, logits: mx.array, masked: Int32) -> None:
        self.size = logits.shape[-1]
        width = _width(self.size, SUM_WIDTH)
        if len(masked):
            allowed = np.ones(self.size, np.bool_)
            allowed[masked] = False
            logits = mx.where(mx.array(allowed), logits, MASKED)
        padded = mx.pad(logits, [(0, 0), (0, width - self.size)], constant_values=PADDING)
        self.shifted = padded - padded.max(-1, keepdims=True)
        self.weights = mx.exp(self.shifted)
        self.total = _sum(self.weights)
        self.log_total = mx.log(self.total)

    def logprobs(self, ids: mx.array) -> mx.array:
        """As `Rows.logprobs`."""
        picked = mx.take_along_axis(self.shifted, self._columns(ids), 1) - self.log_total[:, None]
        return mx.where((ids < 0) | (picked < EXCLUDED), -mx.inf, picked)

    def ranks(self, ids: mx.array) -> mx.array:
        """As `Rows.ranks`."""
        larger = self.shifted > mx.take_along_axis(self.shifted, ids, 1)
        return larger.astype(mx.int32).sum(-1)

    def entropies(self) -> mx.array:
        """As `Rows.entropies`."""
        return mx.maximum(self.log_total - _sum(self.weights * self.shifted) / self.total, 0)

    def top(self, count: int) -> tuple[mx.array, mx.array]:
        """As `Rows.top`."""
        blocks = self.shifted.reshape(self.shifted.shape[0], BLOCK, -1)
        width = blocks.shape[-1]
        chosen = _largest_on_device(blocks.max(1), min(count, width))
        values = mx.take_along_axis(blocks, chosen[:, None, :], 2).reshape(chosen.shape[0], -1)
        ids = (mx.arange(BLOCK)[:, None] * width + chosen[:, None, :].astype(mx.int32)).reshape(chosen.shape[0], -1)
        best = _largest_on_device(values, count)
        values, ids = mx.take_along_axis(values, best, 1), mx.take_along_axis(ids, best, 1)
        ids = mx.take_along_axis(ids, mx.argsort(-values, axis=-1), 1)
        return ids, self.logprobs(ids)

    def tail(self, ids: mx.array) -> mx.array:
        """As `Rows.tail`."""
        rest = _sum(mx.put_along_axis(self.weights, self._columns(ids), mx.array(0.0), 1))
        return mx.log(rest) - self.log_total

    def log_z(self, temperatures: Sequence[float]) -> mx.array:
        """As `Rows.log_z`."""
        columns = [mx.log(_sum(mx.exp(self.shifted / t))) - self.log_total / t for t in temperatures]
        return mx.stack(columns, 1)

    def _columns(self, ids: mx.array) -> mx.array:
        return mx.where(ids < 0, self.size, ids)


def describe(logits: mx.array, ids: Int32, candidates: Int32, wants: ScoreWants, masked: Sequence[int]) -> Arrays:
    """Answer `wants` for float32 logits (R, V) of the real vocabulary; names and shapes are those of `Scores`.

    ids (R,) are the actual tokens, candidates (R, C) the caller's, masked ids get no mass. The extra entry
    "log_total" (R,) is NaN wherever the logits were no numbers.
    """
    blocked = np.asarray(masked, np.int32)
    if mx.default_device() != mx.Device(mx.cpu):
        return describe_on_device(logits, ids, candidates, wants, blocked)
    host = np.asarray(logits)
    tiles = []
    for start in range(0, len(ids), HOST_TILE_ROWS):
        part = slice(start, start + HOST_TILE_ROWS)
        tiles.append(_answers(HostRows(host[part], blocked), ids[part, None], candidates[part], wants))
    return {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}


def describe_on_device(logits: mx.array, ids: Int32, candidates: Int32, wants: ScoreWants, blocked: Int32) -> Arrays:
    """As `describe`, by MLX."""
    found = _answers(DeviceRows(logits, blocked), mx.array(ids[:, None]), mx.array(candidates), wants)
    mx.eval(found)
    return {name: np.array(value) for name, value in found.items()}


def _answers(rows: Rows[A], ids: A, candidates: A, wants: ScoreWants) -> dict[str, A]:
    found = {"log_total": rows.log_total}
    if wants.token_stats:
        found |= {"token_logprobs": rows.logprobs(ids)[:, 0], "ranks": rows.ranks(ids), "entropies": rows.entropies()}
    if wants.top_k:
        found["top_ids"], found["top_logprobs"] = rows.top(wants.top_k)
        found["top_tail"] = rows.tail(found["top_ids"])
    if candidates.shape[1]:
        found |= {"candidate_logprobs": rows.logprobs(candidates), "candidate_tail": rows.tail(candidates)}
    if wants.log_z_temperatures:
        found["log_z"] = rows.log_z(wants.log_z_temperatures)
    return found


def _width(size: int, multiple: int) -> int:
    return (size // multiple + 1) * multiple


def _sum(values: mx.array) -> mx.array:
    return values.reshape(values.shape[0], -1, SUM_WIDTH).sum(-1).sum(-1)


def _largest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    start = values.shape[-1] - count
    return np.argpartition(values, start, axis=-1)[:, start:] if start else _all_columns(values)


def _all_columns(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(values.shape[-1]), values.shape)


def _largest_on_device(values: mx.array, count: int) -> mx.array:
    start = values.shape[-1] - count
    return mx.argpartition(values, start, axis=-1)[:, start:] if start else mx.argsort(values, axis=-1)
