"""SwiGLU in numpy gives what MLX gives, forwards and backwards, and changes one model only."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from opd_daemon.models.host import HostSwiGLU, host_swiglu, use_host_activations

cpu_only = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="on a GPU nothing is replaced")


def values(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 4, shape).astype(np.float32))


def test_values_and_gradients_equal_those_of_mlx() -> None:
    gate, up, slope = values((3, 70, 500), 1), values((3, 70, 500), 2), values((3, 70, 500), 3)
    ours, ours_slopes = mx.vjp(host_swiglu, [gate, up], [slope])
    theirs, their_slopes = mx.vjp(lambda gate, up: nn.silu(gate) * up, [gate, up], [slope])
    for found, expected in zip((*ours, *ours_slopes), (*theirs, *their_slopes), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=2e-5, atol=2e-5)


def test_extreme_inputs_stay_numbers() -> None:
    gate = mx.array([-1e4, -100.0, 0.0, 100.0, 1e4])
    np.testing.assert_allclose(np.array(host_swiglu(gate, mx.ones(5))), [0, 0, 0, 100, 1e4], atol=1e-30)


@cpu_only
def test_a_model_keeps_its_logits_and_its_names(tiny_teacher: Path) -> None:
    model, _ = load_model(tiny_teacher)
    tokens = mx.arange(2, 14)[None]
    names, logits = [name for name, _ in tree_flatten(model.parameters())], np.array(model(tokens))
    kind = type(model.layers[0].mlp)
    assert use_host_activations(model) == len(model.layers)
    assert isinstance(model.layers[0].mlp, HostSwiGLU)
    assert sorted(name for name, _ in tree_flatten(model.parameters())) == sorted(names)
    np.testing.assert_allclose(np.array(model(tokens)), logits, atol=1e-5)
    other, _ = load_model(tiny_teacher)
    assert type(other.layers[0].mlp) is kind


@cpu_only
def test_lora_layers_work_inside(tiny_student: Path) -> None:
    model, _ = load_model(tiny_student)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    tokens = mx.arange(2, 14)[None]
    before = nn.value_and_grad(model, lambda model: model(tokens).square().mean())(model)
    use_host_activations(model)
    after = nn.value_and_grad(model, lambda model: model(tokens).square().mean())(model)
    assert float(before[0]) == pytest.approx(float(after[0]), rel=1e-5)
    for (name, expected), (_, found) in zip(
        sorted(tree_flatten(before[1])), sorted(tree_flatten(after[1])), strict=True
    ):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-3, atol=1e-6, err_msg=name)


@cpu_only
def test_blocks_of_another_kind_are_left_alone() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer()]

    assert use_host_activations(Model()) == 0
