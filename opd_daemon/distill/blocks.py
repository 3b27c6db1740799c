"""The blocks of a model, run one by one by the model's own code.

For the length of a call, stand-ins take the blocks' places in the model's list. So masks, positions and whatever else
a model gives its blocks are its own, and no class is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

Block = Callable[[mx.array], mx.array]
Visit = Callable[[int, mx.array, Block], mx.array]


class NotDrivableError(Exception):
    """The model's blocks can't be run one by one."""


class Blocks:
    """A model's blocks. all: in order. first: the lowest one with anything trainable."""

    def __init__(self, model: Any, body: Callable[[mx.array], mx.array]) -> None:
        self._body = body
        self.all: tuple[Any, ...] = tuple(model.layers)
        name, self._holder, self._list = _holder(model)
        self._prefix = f"{name}.{self._list}." if name else f"{self._list}."
        trainable = [index for index, block in enumerate(self.all) if _trainable(block)]
        self.first = trainable[0] if trainable else len(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def run(self, tokens: mx.array, visit: Visit) -> mx.array:
        """The body's states of tokens `(B, T)`, its blocks replaced by `visit(index, input, block)`.

        `block` is the real one, with the model's own further arguments bound.
        """
        blocks = self._holder[self._list]
        self._holder[self._list] = [_StandIn(index, block, visit) for index, block in enumerate(self.all)]
        try:
            return self._body(tokens)
        finally:
            self._holder[self._list] = blocks

    def names(self, index: int) -> list[str]:
        """Full names of a block's trainable tensors."""
        return [f"{self._prefix}{index}.{name}" for name in _trainable(self.all[index])]

    def tensors(self, index: int) -> list[mx.array]:
        """A block's trainable tensors, in the order of `names`."""
        return list(_trainable(self.all[index]).values())

    @contextmanager
    def replaced(self, index: int, tensors: Sequence[mx.array]) -> Iterator[None]:
        """A block with other trainable tensors, in the order of `names`, for the length of a call."""
        block = self.all[index]
        own = _trainable(block)
        block.update(tree_unflatten(list(zip(own, tensors, strict=True))))
        try:
            yield
        finally:
            block.update(tree_unflatten(list(own.items())))


class _StandIn:
    """Takes a block's place in the model's list; everything but the call is the block's own."""

    def __init__(self, index: int, block: nn.Module, visit: Visit) -> None:
        self._index, self._block, self._visit = index, block, visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, states: mx.array, *arguments: Any, **named: Any) -> mx.array:
        def block(states: mx.array) -> mx.array:
            output = self._block(states, *arguments, **named)
            if not isinstance(output, mx.array):
                raise NotDrivableError("a block gives more than its states")
            return output

        return self._visit(self._index, states, block)


def _trainable(block: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(block.trainable_parameters()))


def _holder(model: Any) -> tuple[str, Any, str]:
    """The module in whose list the blocks are, with its name and the list's."""
    blocks = [id(block) for block in model.layers]
    for name, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, list) and [id(entry) for entry in value] == blocks:
                return name, module, key
    raise NotDrivableError("the blocks are in no list")
