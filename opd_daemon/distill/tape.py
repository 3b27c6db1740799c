"""A forward through the student whose gradient is asked for later, when the loss's slope at the states is known.

The loss is found outside the gradient's graph, chunk by chunk, so forward and backward are two calls, and both go block
by block. Of the last `kept` blocks a forward keeps what their backward needs; of the blocks before them only the input,
and each is computed once more when its turn comes. Blocks below the first trainable one keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from opd_daemon.distill.blocks import Block, Blocks, NotDrivableError
from opd_daemon.distill.pulls import BlockPull, Slots
from opd_daemon.models.split import SplitModel

PROBE_TOKENS = 8
# Both ways compute the same products in another order; a block that takes more than its input is far off this.
PROBE_TOLERANCE = 1e-2


@dataclass(slots=True, eq=False)
class Tape:
    """States of one micro-batch, and what is kept for their gradient.

    states: `(N, D)`, the model's type. `pull` may be called once.
    """

    states: mx.array
    _pull: Callable[[mx.array], dict[str, mx.array]] = field(repr=False)

    def pull(self, slope: mx.array) -> dict[str, mx.array]:
        """Gradients of the trainable tensors, by name: of a loss whose gradient at the states is slope `(N, D)`."""
        return self._pull(slope)


def record(blocks: Blocks, tokens: mx.array, places: mx.array, *, kept: int, seed: int) -> Tape:
    """Run the blocks over tokens `(B, T)` and take the states at places `(N,)` of the B·T positions.

    kept: how many of the last blocks keep everything their backward needs. seed: of dropout; the same seed gives the
    same states and gradients, whatever is kept, because every block draws from a seed of its own.
    """
    first_kept = max(blocks.first, len(blocks) - kept)
    slots = Slots()
    pulls: list[BlockPull] = []

    def visit(index: int, states: mx.array, block: Block) -> mx.array:
        if index < blocks.first:
            output = block(states)
            mx.eval(output)
            return output
        pull = BlockPull(blocks, index, block, states, slots, seed=seed + index)
        pulls.append(pull)
        return pull.forward(keep=index >= first_kept)

    tail, top = _tail(blocks, tokens, places, visit)
    (states,) = tail(top)
    mx.eval(states)

    def pull(slope: mx.array) -> dict[str, mx.array]:
        _, (below,) = mx.vjp(tail, [top], [slope.astype(states.dtype)])
        mx.eval(below)
        gradients: dict[str, mx.array] = {}
        while pulls:
            found, below = pulls.pop().backward(below)
            gradients |= found
        return gradients

    return Tape(states, pull)


def _tail(
    blocks: Blocks, tokens: mx.array, places: mx.array, visit: Callable[[int, mx.array, Block], mx.array]
) -> tuple[Callable[[mx.array], list[mx.array]], mx.array]:
    """Run the blocks. Returns what comes out of the last, and what the model does to that."""
    last = len(blocks) - 1
    top = None

    def noting(index: int, states: mx.array, block: Block) -> mx.array:
        nonlocal top
        top = visit(index, states, block)
        return top

    blocks.run(tokens, noting)  # what follows the blocks is not computed yet
    if top is None:
        raise NotDrivableError("the model calls none of its blocks")

    def tail(given: mx.array) -> list[mx.array]:
        hidden = blocks.run(tokens, lambda index, states, _: given if index == last else states)
        return [hidden.reshape(-1, hidden.shape[-1])[places]]

    return tail, top


def drivable_blocks(model: Any, parts: SplitModel) -> Blocks | None:
    """The model's blocks, proved on a probe to give the gradients of plain autodiff; None where they don't.

    The model is in evaluation mode.
    """
    tokens = mx.arange(1, 1 + 2 * PROBE_TOKENS, dtype=mx.int32).reshape(2, PROBE_TOKENS)
    places = mx.arange(1, 2 * PROBE_TOKENS, 2)
    try:
        blocks = Blocks(model, parts.body)
        expected_states, expected = plain_gradients(model, parts.body, tokens, places, _probe_slope)
        for kept in (0, len(blocks)):
            tape = record(blocks, tokens, places, kept=kept, seed=0)
            if not _near(tape.states, expected_states):
                return None
            found = tape.pull(_probe_slope(tape.states))
            if found.keys() != expected.keys() or not all(_near(found[name], expected[name]) for name in expected):
                return None
    except (NotDrivableError, TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return blocks


def plain_gradients(
    model: Any,
    body: Callable[[mx.array], mx.array],
    tokens: mx.array,
    places: mx.array,
    slope_at: Callable[[mx.array], mx.array],
) -> tuple[mx.array, dict[str, mx.array]]:
    """States at `places`, and gradients of a loss whose slope there is `slope_at(states)`; by autodiff of the whole."""

    def weighted() -> tuple[mx.array, mx.array]:
        hidden = body(tokens)
        states = hidden.reshape(-1, hidden.shape[-1])[places]
        return (states.astype(mx.float32) * mx.stop_gradient(slope_at(states))).sum(), states

    (_, states), gradients = nn.value_and_grad(model, weighted)()
    found = dict(tree_flatten(gradients))
    mx.eval(states, found)
    return states, found


def _probe_slope(states: mx.array) -> mx.array:
    return mx.cos(mx.arange(states.size)).reshape(states.shape)


def _near(found: mx.array, expected: mx.array) -> bool:
    first, second = found.astype(mx.float32), expected.astype(mx.float32)
    return bool(mx.abs(first - second).max() <= PROBE_TOLERANCE * mx.abs(second).max())
