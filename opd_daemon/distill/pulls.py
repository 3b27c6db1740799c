"""Forward and backward of one block as two calls, with only what the backward needs alive between them.

MLX builds forward and backward as one graph, so the backward is built first, around an array that stands for the slope
at the block's output. Evaluating the output then frees everything the backward has no use for. Once the slope is known
it is written where the stand-in's memory is, and the rest of the graph is evaluated. (What is written through numpy's
view of an MLX array is in that array; `tape.drivable_blocks` proves it on every machine.)

Where SwiGLU is numpy's (see `models.host`) the graph is cut there: its product is an input of the graph, gate and up
are outputs, and numpy carries the slope across.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.distill.blocks import Block, Blocks
from opd_daemon.models.host import HostSwiGLU, host_swiglu, swiglu, swiglu_slopes


class Slots:
    """Arrays that stand in graphs for values not known yet. One of a name serves all blocks, one after the other."""

    def __init__(self) -> None:
        self._slots: dict[str, mx.array] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """The float32 array of a name, the same one whenever the shape is."""
        slot = self._slots.get(name)
        if slot is None or slot.shape != shape:
            slot = self._slots[name] = mx.zeros(shape)
            mx.eval(slot)
        return slot


class BlockPull:
    """One block of a micro-batch: `forward`, then once `backward`. seed: of its dropout."""

    def __init__(self, blocks: Blocks, index: int, block: Block, given: mx.array, slots: Slots, *, seed: int) -> None:
        self._blocks, self._index, self._block = blocks, index, block
        self._given, self._slots, self._seed = given, slots, seed
        self._activation = _host_activation(blocks.all[index], given)
        self._outputs: list[mx.array] = []
        self._pulled: list[mx.array] = []

    def forward(self, *, keep: bool) -> mx.array:
        """The block's output, evaluated; keep: with everything the backward needs."""
        if not keep:
            mx.random.seed(self._seed)
            output = self._block(self._given)
            mx.eval(output)
            return output
        self._build()
        output = self._outputs.pop()
        if self._activation:
            mx.eval(self._outputs)
            swiglu(*map(_view, [*self._outputs, self._product(self._activation)]))
        mx.eval(output)
        return output

    def backward(self, slope: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """Gradients of the block's trainable tensors, by name, and the slope at its input."""
        if not self._pulled:
            self._build()
            self._outputs.pop()
        _view(self._slots.get("slope", slope.shape))[...] = _view(slope.astype(mx.float32))
        if self._activation:
            to_product = self._pulled.pop()
            mx.eval(to_product, self._outputs)
            crossing = [self._slots.get(name, to_product.shape) for name in ("gate", "up")]
            products = _view(self._product(self._activation))
            swiglu_slopes(*map(_view, [*self._outputs, to_product, *crossing]), products=products)
        mx.eval(self._pulled)
        below = self._pulled.pop(0) if self._wants_input else slope
        return dict(zip(self._blocks.names(self._index), self._pulled, strict=True)), below

    @property
    def _wants_input(self) -> bool:
        return self._index > self._blocks.first

    def _product(self, activation: HostSwiGLU) -> mx.array:
        """What stands for the product of SwiGLU."""
        layer = getattr(activation.up_proj, "linear", activation.up_proj)
        return self._slots.get("product", (*self._given.shape[:-1], layer.weight.shape[0]))

    def _build(self) -> None:
        """Build both graphs.

        Outputs: gate and up, where the graph is cut, and the block's. Pulled: slopes at the input (of all but the
        lowest block), at the trainable tensors and, where the graph is cut, at the product.
        """
        slope = self._slots.get("slope", self._given.shape).astype(self._given.dtype)
        inputs = [*([self._given] if self._wants_input else []), *self._blocks.tensors(self._index)]
        slopes = [slope]
        if self._activation:
            product = self._product(self._activation)
            inputs.append(product)
            slopes = [*(self._slots.get(name, product.shape) for name in ("gate", "up")), slope]
        self._outputs, self._pulled = mx.vjp(self._run, inputs, slopes)

    def _run(self, *inputs: mx.array) -> list[mx.array]:
        rest = list(inputs)
        given = rest.pop(0) if self._wants_input else self._given
        mx.random.seed(self._seed)
        if not self._activation:
            with self._blocks.replaced(self._index, rest):
                return [self._block(given)]
        product = rest.pop()
        crossing: list[mx.array] = []

        def cut(gate: mx.array, up: mx.array) -> mx.array:
            crossing.extend((gate, up))
            return product

        self._activation.activation = cut
        try:
            with self._blocks.replaced(self._index, rest):
                output = self._block(given)
            return [*crossing, output]
        finally:
            self._activation.activation = host_swiglu


def _view(array: mx.array) -> npt.NDArray[np.float32]:
    """The array's own memory."""
    return np.array(array, copy=False)


def _host_activation(block: Any, given: mx.array) -> HostSwiGLU | None:
    """The block's SwiGLU, where numpy computes it."""
    found = [module for _, module in block.named_modules() if isinstance(module, HostSwiGLU)]
    return found[0] if len(found) == 1 and given.dtype == mx.float32 else None
