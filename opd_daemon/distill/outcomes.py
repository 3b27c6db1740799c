"""A student's distribution reduced to K+1 outcomes, K named ids and the tail, with its gradient in closed form.

∂log s_i/∂z_j = (δ_ij − s_j)/T for the ids and ∂log s_tail/∂z_j = ([j in tail]·s_j/s_tail − s_j)/T for the tail. The
tail's mass is summed in the log domain and never taken as 1 − Σ, so both are right however small it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from opd_daemon.arrays import Float32, Int32
from opd_daemon.distill.logits import IMPOSSIBLE, in_tiles, logsumexp, on_host


def student_outcomes(logits: mx.array, ids: mx.array, temperature: float = 1.0) -> mx.array:
    """Log-probabilities at a temperature of the ids `(N, K)` and of everything else: `(N, V)` → `(N, K+1)`.

    −1 fills unused places of ids; the first is always used and none comes twice. Impossible outcomes get about −1e30
    rather than −inf.
    """
    result: mx.array = _differentiable(1.0 / temperature)(logits, ids)
    return result


def outcome_slopes(
    logits: mx.array, ids: mx.array, outcomes: mx.array, pull: mx.array, temperature: float = 1.0
) -> mx.array:
    """The gradient at the logits `(N, V)` of a number whose derivative by the outcomes `(N, K+1)` is `pull`.

    outcomes: as `student_outcomes` gives them.
    """
    scale = 1.0 / temperature
    if on_host():
        return in_tiles(_HostSlopes(scale), logits, ids, pull, outcomes, width=logits.shape[-1])
    return _device_slopes(scale, logits, ids, pull, outcomes)


@cache
def _differentiable(scale: float) -> Any:
    @mx.custom_function
    def outcomes(logits: mx.array, ids: mx.array) -> mx.array:
        if on_host():
            return in_tiles(_HostOutcomes(scale), logits, ids, width=ids.shape[-1] + 1)
        return _device_outcomes(scale, logits, ids)

    @outcomes.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        logits, ids = primals
        return outcome_slopes(logits, ids, output, cotangent, 1.0 / scale), mx.zeros_like(ids)

    return outcomes


def _device_outcomes(scale: float, logits: mx.array, ids: mx.array) -> mx.array:
    used, places = _device_places(ids)
    named = mx.where(used, mx.take_along_axis(logits, places, axis=-1) * scale, IMPOSSIBLE)
    others = mx.put_along_axis(logits, places, mx.array(IMPOSSIBLE, dtype=logits.dtype), axis=-1)
    both = mx.concatenate([named, logsumexp(others * scale)], axis=-1)
    return both - mx.logsumexp(both, axis=-1, keepdims=True)


def _device_slopes(scale: float, logits: mx.array, ids: mx.array, pull: mx.array, outcomes: mx.array) -> mx.array:
    used, places = _device_places(ids)
    log_z = mx.take_along_axis(logits, places[:, :1], axis=-1) * scale - outcomes[:, :1]
    total = pull.sum(axis=-1, keepdims=True)
    named = pull[:, :-1] - mx.exp(outcomes[:, :-1]) * total
    named = mx.where(used, named, named[:, :1])
    tail = pull[:, -1:] - mx.exp(outcomes[:, -1:]) * total
    within_tail = mx.exp(mx.minimum(logits * scale - (log_z + outcomes[:, -1:]), 0.0))
    return mx.put_along_axis(within_tail * (tail * scale), places, named * scale, axis=-1)


class _HostOutcomes:
    """The same in numpy, for a tile."""

    def __init__(self, scale: float) -> None:
        self.scale = np.float32(scale)

    def __call__(self, logits: Float32, ids: Int32) -> Float32:
        used, places = _host_places(ids)
        others = logits * self.scale
        named = np.where(used, np.take_along_axis(others, places, axis=-1), IMPOSSIBLE)
        np.put_along_axis(others, places, IMPOSSIBLE, axis=-1)
        both = np.concatenate([named, _log_sum(others)], axis=-1)
        return np.asarray(both - _log_sum(both.copy()), np.float32)


class _HostSlopes:
    """The same in numpy, for a tile."""

    def __init__(self, scale: float) -> None:
        self.scale = np.float32(scale)

    def __call__(self, logits: Float32, ids: Int32, pull: Float32, outcomes: Float32) -> Float32:
        used, places = _host_places(ids)
        log_z = np.take_along_axis(logits, places[:, :1], axis=-1) * self.scale - outcomes[:, :1]
        total = pull.sum(axis=-1, keepdims=True)
        named = pull[:, :-1] - np.exp(outcomes[:, :-1]) * total
        named = np.where(used, named, named[:, :1])
        tail = pull[:, -1:] - np.exp(outcomes[:, -1:]) * total
        within_tail = logits * self.scale
        within_tail -= log_z + outcomes[:, -1:]
        np.put_along_axis(within_tail, places, IMPOSSIBLE, axis=-1)
        np.exp(within_tail, out=within_tail)
        within_tail *= tail * self.scale
        np.put_along_axis(within_tail, places, named * self.scale, axis=-1)
        return within_tail


def _log_sum(values: Float32) -> Float32:
    """Log-sum-exp of every row, in the memory of its argument."""
    largest = values.max(axis=-1, keepdims=True)
    values -= largest
    np.exp(values, out=values)
    result: Float32 = np.log(values.sum(axis=-1, keepdims=True)) + largest
    return result


# Unused places repeat the first id, so that writing through them writes the same value twice.


def _device_places(ids: mx.array) -> tuple[mx.array, mx.array]:
    used = ids >= 0
    return used, mx.where(used, ids, ids[:, :1])


def _host_places(ids: Int32) -> tuple[Any, Int32]:
    used = ids >= 0
    return used, np.where(used, ids, ids[:, :1])
