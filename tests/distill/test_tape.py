"""A forward whose gradient is asked for later: the same states and gradients, whatever is kept of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx_lm.utils import quantize_model, save_config, save_model

from opd_daemon.config import LoraConfig
from opd_daemon.distill.blocks import Blocks, NotDrivableError
from opd_daemon.distill.student import Student
from opd_daemon.distill.tape import drivable_blocks, plain_gradients, record
from opd_daemon.models.split import split
from tests.tiny import write_tiny_qwen2

TOKENS = mx.array(np.random.default_rng(0).integers(1, 400, (3, 12)).astype(np.int32))
PLACES = mx.array([3, 4, 5, 17, 18, 30])
SLOPE = mx.array(np.random.default_rng(1).normal(size=(6, 64)).astype(np.float32))
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("models") / "base", layers=LAYERS)


@pytest.fixture(scope="module")
def quantised(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "quantised"
    shutil.copytree(base, path)
    model, tokenizer, config = mlx_lm.load(str(base), return_config=True)
    del tokenizer
    model, config = quantize_model(model, config, group_size=32, bits=4)
    (path / "model.safetensors").unlink()
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


def loaded(path: Path, **lora: Any) -> Student:
    """A student whose adapter already does something."""
    student = Student.load(path, None, LoraConfig(**{"rank": 4, **lora}), seed=3)
    noise = np.random.default_rng(0)
    student.update(
        {
            name: tensor + mx.array(noise.normal(size=tensor.shape).astype(np.float32) * 0.05)
            for name, tensor in student.parameters().items()
        }
    )
    return student


def gradients(student: Student, kept: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    assert student.blocks is not None
    tape = record(student.blocks, TOKENS, PLACES, kept=kept, seed=5)
    return np.array(tape.states), {name: np.array(value) for name, value in tape.pull(SLOPE).items()}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"dora": True},
    {"num_layers": 2},
    {"keys": ["self_attn.q_proj", "mlp.down_proj"]},
]


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
@pytest.mark.parametrize("stored", ["base", "quantised"])
def test_gradients_are_those_of_plain_autodiff(
    lora: dict[str, Any], stored: str, request: pytest.FixtureRequest
) -> None:
    student = loaded(request.getfixturevalue(stored), **lora)
    states, expected = plain_gradients(student.model, student.hidden, TOKENS, PLACES, lambda _: SLOPE)
    for kept in range(LAYERS + 1):
        found_states, found = gradients(student, kept)
        assert np.abs(found_states - np.array(states)).max() < 1e-5
        assert found.keys() == expected.keys() == student.parameters().keys()
        for name, value in found.items():
            assert np.abs(value - np.array(expected[name])).max() <= 2e-5 * max(np.abs(value).max(), 1e-3), name


def test_what_is_kept_changes_no_bit(base: Path) -> None:
    student = loaded(base)
    states, whole = gradients(student, LAYERS)
    for kept in range(LAYERS):
        found_states, found = gradients(student, kept)
        assert np.array_equal(found_states, states)
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_dropout_is_the_same_whatever_is_kept(base: Path) -> None:
    student = loaded(base, dropout=0.5)
    assert student.blocks
    quiet, _ = gradients(student, LAYERS)
    student.model.train()
    states, whole = gradients(student, LAYERS)
    assert not np.array_equal(states, quiet)
    for kept in range(LAYERS):
        found_states, found = gradients(student, kept)
        assert np.array_equal(found_states, states)
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_blocks_draw_different_dropout(base: Path) -> None:
    student = loaded(base, dropout=0.5)
    blocks = student.blocks
    assert blocks
    student.model.train()
    drawn: list[np.ndarray] = []

    def visit(index: int, states: mx.array, block: Any) -> mx.array:
        mx.random.seed(9 + index)
        drawn.append(np.array(blocks.all[0].mlp.up_proj.dropout(mx.ones((4, 16)))))
        return states

    blocks.run(TOKENS, visit)
    assert len({array.tobytes() for array in drawn}) == LAYERS


def test_the_model_is_as_it_was_afterwards(base: Path) -> None:
    student = loaded(base)
    before = np.array(student.model(TOKENS))
    tensors = {name: np.array(tensor) for name, tensor in student.parameters().items()}
    for kept in (0, 2, LAYERS):
        gradients(student, kept)
    assert np.array_equal(np.array(student.model(TOKENS)), before)
    assert student.parameters().keys() == tensors.keys()
    assert all(np.array_equal(np.array(value), tensors[name]) for name, value in student.parameters().items())
    assert all(isinstance(layer, nn.Module) for layer in student.model.layers)


def test_a_fault_inside_a_block_leaves_the_model_as_it_was(base: Path) -> None:
    student = loaded(base)
    assert student.blocks
    expected = np.array(student.model(TOKENS))

    def fail(index: int, states: mx.array, block: Any) -> mx.array:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        student.blocks.run(TOKENS, fail)
    assert np.array_equal(np.array(student.model(TOKENS)), expected)


def test_blocks_below_the_adapter_keep_nothing(base: Path) -> None:
    student = loaded(base, num_layers=1)
    assert student.blocks
    assert student.blocks.first == LAYERS - 1
    assert student.blocks.names(0) == []


class Leaking(nn.Module):
    """A block whose input reaches the loss by a second way: what one block passes on to the next isn't all there is."""

    def __init__(self, block: nn.Module, shared: list[mx.array]) -> None:
        super().__init__()
        self.block = block
        self._shared = shared

    def __call__(self, states: mx.array, *arguments: Any, **named: Any) -> mx.array:
        self._shared.append(states)
        return self.block(states, *arguments, **named) + self._shared[0]


class Pairs(nn.Module):
    """A block that gives more than its states."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __call__(self, states: mx.array, *arguments: Any, **named: Any) -> tuple[mx.array, None]:
        return self.block(states, *arguments, **named), None


def test_models_whose_blocks_share_more_than_states_are_not_driven(base: Path) -> None:
    student = loaded(base)
    shared: list[mx.array] = []
    inner = student.model.model
    original = inner.__class__.__call__
    inner.layers = [Leaking(block, shared) for block in inner.layers]

    def body(tokens: mx.array, cache: Any = None) -> mx.array:
        shared.clear()
        return original(inner, tokens, cache)

    parts = split(student.model, 400)
    leaking = type(parts)(body, parts.head, parts.hidden_size, parts.width, parts.dtype)
    assert drivable_blocks(student.model, leaking) is None


def test_blocks_that_give_more_than_states_are_not_driven(base: Path) -> None:
    student = loaded(base)
    student.model.model.layers = [Pairs(block) for block in student.model.model.layers]
    assert drivable_blocks(student.model, student.parts) is None


def test_a_model_without_a_list_of_blocks_is_not_driven(base: Path) -> None:
    student = loaded(base)

    class Hidden(type(student.model)):  # type: ignore[misc]
        layers = property(lambda self: [block.mlp for block in self.model.layers])

    student.model.__class__ = Hidden
    with pytest.raises(NotDrivableError):
        Blocks(student.model, student.parts.body)
    assert drivable_blocks(student.model, student.parts) is None
