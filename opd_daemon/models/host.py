"""SwiGLU computed by numpy where MLX runs on a CPU.

MLX's `exp` takes a CPU about twenty times as long as numpy's, and there SwiGLU is a third of a small model's forward.
Only instances of a model are changed, never mlx-lm's classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

Array = npt.NDArray[np.float32]

# So many values stay in a core's cache.
TILE = 1 << 15


def use_host_activations(model: Any) -> int:
    """Give every SwiGLU block of a float32 model on a CPU one that computes its activation in numpy; counts them.

    Elsewhere, and for blocks of another kind, nothing happens. Parameters keep their names.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return 0
    found = 0
    for layer in getattr(model, "layers", ()):
        block = getattr(layer, "mlp", None)
        if _is_swiglu(block):
            layer.mlp = HostSwiGLU(block)
            found += 1
    return found


class HostSwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), with the layers of the block it replaces.

    activation: what computes silu(gate) · up; whoever takes gradients in parts puts something else here for a call.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gate_proj = block.gate_proj
        self.up_proj = block.up_proj
        self.down_proj = block.down_proj
        self.activation: Callable[..., Any] = host_swiglu

    def __call__(self, x: mx.array) -> mx.array:
        """States `(…, D)` → `(…, D)`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = self.activation(gate, up) if gate.dtype == mx.float32 else nn.silu(gate) * up
        result: mx.array = self.down_proj(product)
        return result


def _is_swiglu(block: Any) -> bool:
    """Whether a block is the plain SwiGLU of Llama and Qwen, proved on one row."""
    names: Any = block.children() if isinstance(block, nn.Module) else ()  # type: ignore[no-untyped-call]
    if set(names) != {"gate_proj", "up_proj", "down_proj"}:
        return False
    up = getattr(block.up_proj, "linear", block.up_proj)
    width = int(up.weight.shape[-1]) * 32 // (up.bits if isinstance(up, nn.QuantizedLinear) else 32)
    row = mx.sin(mx.arange(width, dtype=mx.float32))[None]
    expected, ours = block(row), HostSwiGLU(block)(row)
    return bool(mx.abs(expected - ours).max() <= 1e-4 * mx.abs(expected).max())


@mx.custom_function
def host_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, element by element."""
    result = np.empty(gate.shape, dtype=np.float32)
    swiglu(np.asarray(gate), np.asarray(up), result)
    return mx.array(result)


@host_swiglu.vjp
def _host_swiglu_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gates, ups, slopes = (np.asarray(array) for array in (*primals, cotangent))
    to_gate, to_up = np.empty_like(gates), np.empty_like(gates)
    swiglu_slopes(gates, ups, slopes, to_gate, to_up)
    return mx.array(to_gate), mx.array(to_up)


def swiglu(gates: Array, ups: Array, result: Array) -> None:
    """Write silu(gates) · ups, all of one shape and contiguous; the result may take the place of the gates."""
    for part in _tiles(gates.size):
        z = gates.reshape(-1)[part]
        np.multiply(z * _sigmoid(z), ups.reshape(-1)[part], out=result.reshape(-1)[part])


def swiglu_slopes(
    gates: Array, ups: Array, slopes: Array, to_gates: Array, to_ups: Array, *, products: Array | None = None
) -> None:
    """Pull slopes at silu(gates) · ups back to both, and write those products once more where they are asked for."""
    for part in _tiles(gates.size):
        z, u, slope = (array.reshape(-1)[part] for array in (gates, ups, slopes))
        share = _sigmoid(z)
        silu = z * share
        if products is not None:
            np.multiply(silu, u, out=products.reshape(-1)[part])
        np.multiply(silu, slope, out=to_ups.reshape(-1)[part])
        share += silu * (1.0 - share)
        share *= u
        np.multiply(share, slope, out=to_gates.reshape(-1)[part])


def _tiles(size: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, size, TILE)]


def _sigmoid(z: Array) -> Array:
    # exp overflows to infinity below −88, and 1 / infinity is the right answer
    with np.errstate(over="ignore"):
        result: Array = np.exp(-z)
    result += 1.0
    return np.divide(1.0, result, out=result)
