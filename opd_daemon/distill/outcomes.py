"""A student's distribution reduced to K+1 outcomes, K named ids and the tail, with its gradient in closed form.

∂log s_i/∂z_j = (δ_ij − s_j)/T for the ids and ∂log s_tail/∂z_j = ([j in tail]·s_j/s_tail − s_j)/T for the tail. The
tail's mass is summed in the log domain and never taken as 1 − Σ, so both are right however small it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from opd_daemon.distill.logits import IMPOSSIBLE, in_tiles, logsumexp, on_host
from opd_daemon.types import Float32, Int32


def student_outcomes(logits: mx.array, ids: mx.array, temperature: float = 1.0) -> mx.array:
    """Log-probabilities at a temperature of the ids `(N, K)` and of everything else: `(N, V)` → `(N, K+1)`.

    −1 fills unused places of ids; the first is always used and none comes twice. Impossible outcomes get about −1e30
    rather than −inf.
    """
    on_device, on_cpu = _device_outcomes(1.0 / temperature), _host_outcomes(1.0 / temperature)
    result: mx.array = (on_cpu if on_host() else on_device)(logits, ids)
    return result


@cache
def _device_outcomes(scale: float) -> Any:
    @mx.custom_function
    def outcomes(logits: mx.array, ids: mx.array) -> mx.array:
        used, places = _device_places(ids)
        named = mx.where(used, mx.take_along_axis(logits, places, axis=-1) * scale, IMPOSSIBLE)
        others = mx.put_along_axis(logits, places, mx.array(IMPOSSIBLE, dtype=logits.dtype), axis=-1)
        both = mx.concatenate([named, logsumexp(others * scale)], axis=-1)
        return both - mx.logsumexp(both, axis=-1, keepdims=True)

    @outcomes.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        logits, ids = primals
        used, places = _device_places(ids)
        log_z = mx.take_along_axis(logits, places[:, :1], axis=-1) * scale - output[:, :1]
        total = cotangent.sum(axis=-1, keepdims=True)
        named = cotangent[:, :-1] - mx.exp(output[:, :-1]) * total
        named = mx.where(used, named, named[:, :1])
        tail = cotangent[:, -1:] - mx.exp(output[:, -1:]) * total
        within_tail = mx.exp(mx.minimum(logits * scale - (log_z + output[:, -1:]), 0.0))
        return mx.put_along_axis(within_tail * (tail * scale), places, named * scale, axis=-1), mx.zeros_like(ids)

    return outcomes


@cache
def _host_outcomes(scale: float) -> Any:
    """The same in numpy. MLX evaluates the logits when numpy asks for them."""

    def forward_tile(logits: Float32, ids: Int32) -> Float32:
        used, places = _host_places(ids)
        others = logits * np.float32(scale)
        named = np.where(used, np.take_along_axis(others, places, axis=-1), IMPOSSIBLE)
        np.put_along_axis(others, places, IMPOSSIBLE, axis=-1)
        both = np.concatenate([named, _log_sum(others)], axis=-1)
        return np.asarray(both - _log_sum(both.copy()), np.float32)

    def backward_tile(logits: Float32, ids: Int32, cotangent: Float32, output: Float32) -> Float32:
        used, places = _host_places(ids)
        log_z = np.take_along_axis(logits, places[:, :1], axis=-1) * np.float32(scale) - output[:, :1]
        total = cotangent.sum(axis=-1, keepdims=True)
        named = cotangent[:, :-1] - np.exp(output[:, :-1]) * total
        named = np.where(used, named, named[:, :1])
        tail = cotangent[:, -1:] - np.exp(output[:, -1:]) * total
        within_tail = logits * np.float32(scale)
        within_tail -= log_z + output[:, -1:]
        np.put_along_axis(within_tail, places, IMPOSSIBLE, axis=-1)
        np.exp(within_tail, out=within_tail)
        within_tail *= tail * np.float32(scale)
        np.put_along_axis(within_tail, places, named * np.float32(scale), axis=-1)
        return within_tail

    @mx.custom_function
    def outcomes(logits: mx.array, ids: mx.array) -> mx.array:
        return in_tiles(forward_tile, logits, ids)

    @outcomes.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        return in_tiles(backward_tile, *primals, cotangent, output), mx.zeros_like(primals[1])

    return outcomes


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
