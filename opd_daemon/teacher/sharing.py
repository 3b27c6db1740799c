"""Prompts that several sequences begin with: computed once, their keys and values seen by all.

A prefix is computed as one row without padding, so every kind of cache that holds a state per row can be continued by
many rows exactly; what differs is only in which shape the same sums are taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from opd_daemon.arrays import Int32
from opd_daemon.models.split import SplitModel
from opd_daemon.teacher import mlxlm

# With less of the work saved, two forward passes instead of one don't pay.
WORTH = 1 / 8
PROBE_PREFIX, PROBE_REST = 10, 6
# A cache that is continued wrongly changes the states altogether; rounding, even of bfloat16, by far less.
PROBE_TOLERANCE = 0.05


def common_prefix(first: Int32, second: Int32) -> int:
    """Number of tokens both begin with."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


def saving(prefix: int, sizes: Sequence[int]) -> float:
    """Share of the work that is saved when sequences of so many tokens compute their common prefix once."""
    return (len(sizes) - 1) * prefix / max(sum(sizes), 1)


def shared_prefix(inputs: Sequence[Int32]) -> int:
    """How many tokens to compute once for all of these sequences; 0 where that doesn't pay."""
    prefix = min(common_prefix(inputs[0], other) for other in inputs)
    return prefix if saving(prefix, [len(ids) for ids in inputs]) >= WORTH else 0


class ForkedCache:
    """Stands in for mlx-lm's KVCache: rows (B, …) that go on from one computed prefix (1, H, P, D).

    The prefix is never copied for good: each layer sees it once a row only while it computes. keep: whether more tokens
    will follow those of the next call.
    """

    def __init__(self, prefix: Any, rows: int, *, keep: bool) -> None:
        self.offset: int = prefix.offset
        self._prefix = [tensor[..., : prefix.offset, :] for tensor in (prefix.keys, prefix.values)]
        self._own: list[mx.array] = []
        self._rows = rows
        self._keep = keep

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """Keys and values (B, H, n, D) of new tokens; returns all there are, of the prefix first."""
        new = [keys, values]
        own = [mx.concatenate([*pair], axis=2) for pair in zip(self._own, new, strict=True)] if self._own else new
        self.offset += keys.shape[2]
        if self._keep:
            self._own = own
        return tuple(
            mx.concatenate([_repeated(prefix, self._rows), tensor], axis=2)
            for prefix, tensor in zip(self._prefix, own, strict=True)
        )

    @property
    def state(self) -> list[mx.array]:
        """What has to be evaluated between two calls."""
        return self._own

    def make_mask(self, *arguments: Any, **settings: Any) -> Any:
        """As that of KVCache."""
        return mlxlm.module("models.cache").create_attention_mask(*arguments, offset=self.offset, **settings)


def fork(cache: Sequence[Any], rows: int, *, keep: bool) -> list[Any]:
    """Caches for `rows` sequences that go on from the one sequence in `cache`, which stays as it is."""
    return [_fork_entry(entry, rows, keep) for entry in cache]


def can_share(model: Any, parts: SplitModel, vocab_size: int) -> bool:
    """Whether sequences can go on from a computed prefix: the caches' kinds are known, and a probe comes out right."""
    cache = mlxlm.module("models.cache").make_prompt_cache(model)
    if not all(_known(entry) for entry in cache):
        return False
    try:
        return _probe(parts, cache, vocab_size)
    except (AttributeError, TypeError, ValueError):  # a model that reaches into its caches' insides
        return False


def _probe(parts: SplitModel, cache: Sequence[Any], vocab_size: int) -> bool:
    size = PROBE_PREFIX + 2 * PROBE_REST
    ids = np.asarray(mx.arange(size) * 7919 % vocab_size)
    prefix, rests = ids[None, :PROBE_PREFIX], ids[PROBE_PREFIX:].reshape(2, PROBE_REST)
    whole = parts.body(mx.array(np.concatenate([np.repeat(prefix, 2, 0), rests], 1)))[:, PROBE_PREFIX:]
    mx.eval(parts.body(mx.array(prefix), cache))
    forked = fork(cache, 2, keep=True)
    half = PROBE_REST // 2
    states = mx.concatenate([parts.body(mx.array(piece), forked) for piece in (rests[:, :half], rests[:, half:])], 1)
    difference = mx.abs((states - whole).astype(mx.float32)).max()
    return bool(difference <= PROBE_TOLERANCE * mx.abs(whole.astype(mx.float32)).max())


def _known(entry: Any) -> bool:
    kinds = mlxlm.module("models.cache")
    if type(entry) is kinds.CacheList:
        return all(_known(part) for part in entry.caches)
    return type(entry) in {kinds.KVCache, kinds.RotatingKVCache, kinds.ArraysCache}


def _fork_entry(entry: Any, rows: int, keep: bool) -> Any:
    kinds = mlxlm.module("models.cache")
    if type(entry) is kinds.KVCache:
        return ForkedCache(entry, rows, keep=keep)
    forked = copy.copy(entry)
    if type(entry) is kinds.CacheList:
        forked.caches = tuple(_fork_entry(part, rows, keep) for part in entry.caches)
    elif type(entry) is kinds.ArraysCache:
        forked.cache = [None if state is None else _repeated(state, rows) for state in entry.cache]
    else:
        forked.keys, forked.values = _repeated(entry.keys, rows), _repeated(entry.values, rows)
    return forked


def _repeated(tensor: mx.array, rows: int) -> mx.array:
    return mx.broadcast_to(tensor, (rows, *tensor.shape[1:]))
