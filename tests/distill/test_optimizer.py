"""Learning rates and the optimizer's state."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from opd_daemon.config import LoraConfig, OptimizerName, RunConfig, parse_config
from opd_daemon.distill.optimizer import KINDS, Optimizer, clipped, learning_rate
from opd_daemon.distill.optimizer_options import OPTIONS, optimizer_faults, optimizer_settings
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason


def config(**changes: Any) -> RunConfig:
    settings = {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p", "num_steps": 20}
    return parse_config({**settings, "learning_rate": 0.1, "warmup_steps": 4, **changes})


def test_warm_up_rises_to_the_rate_and_decay_falls_to_nothing() -> None:
    for schedule in ("cosine", "linear"):
        rates = [learning_rate(step, config(lr_schedule=schedule)) for step in range(1, 21)]
        assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
        assert rates[4] == pytest.approx(0.1)
        assert all(late < early for early, late in pairwise(rates[4:]))
        assert 0 < rates[-1] < 0.01


def test_a_constant_rate_and_no_warm_up() -> None:
    assert learning_rate(1, config(warmup_steps=0, lr_schedule="constant")) == 0.1
    assert learning_rate(20, config(warmup_steps=0, lr_schedule="constant")) == 0.1


def test_warm_up_longer_than_the_run_never_reaches_the_rate() -> None:
    assert learning_rate(20, config(warmup_steps=50)) < 0.1


def test_clipping_keeps_small_gradients_and_scales_large_ones() -> None:
    small, norm = clipped({"a": mx.array([0.3, 0.4])}, 1.0)
    assert norm == pytest.approx(0.5)
    assert small["a"].tolist() == pytest.approx([0.3, 0.4])
    large, norm = clipped({"a": mx.array([3.0, 4.0])}, 1.0)
    assert norm == pytest.approx(5.0)
    assert large["a"].tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


OPTIMIZERS: list[tuple[str, dict[str, Any], float]] = [
    ("adamw", {}, 0.1),
    ("adam", {"betas": [0.8, 0.9], "bias_correction": False}, 0.0),
    ("adafactor", {"beta_1": 0.9, "scale_parameter": True}, 0.1),
    ("lion", {}, 0.1),
    ("muon", {"ns_steps": 3}, 0.1),
    ("sgd", {"momentum": 0.9, "nesterov": True}, 0.1),
]


def updated(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        mx.random.seed(step)
        noise = {name: mx.random.normal(value.shape) for name, value in optimizer.student.parameters().items()}
        optimizer.update(tree_unflatten(list(noise.items())), step)


@pytest.mark.parametrize("lora", [LoraConfig(rank=2), LoraConfig(rank=2, dora=True, num_layers=1)], ids=str)
@pytest.mark.parametrize(("name", "options", "decay"), OPTIMIZERS)
def test_saved_state_goes_on_exactly(
    tiny_student: Path, tmp_path: Path, lora: LoraConfig, name: str, options: dict[str, Any], decay: float
) -> None:
    settings = config(optimizer=name, optimizer_options=options, weight_decay=decay)
    through = Optimizer(Student.load(tiny_student, None, lora, seed=0), settings)
    start = {name: np.array(value) for name, value in through.student.parameters().items()}
    updated(through, range(1, 7))

    first = Optimizer(Student.load(tiny_student, None, lora, seed=0), settings)
    updated(first, range(1, 4))
    first.student.save_adapter(tmp_path)
    first.save(tmp_path / "optimizer.safetensors")
    second = Optimizer(Student.load(tiny_student, tmp_path, LoraConfig(), seed=5), settings)
    second.load(tmp_path / "optimizer.safetensors")
    updated(second, range(4, 7))
    for tensor, value in through.student.parameters().items():
        assert mx.array_equal(value, second.student.parameters()[tensor]), tensor
        assert np.isfinite(np.array(value)).all()
        assert not np.array_equal(np.array(value), start[tensor])
    ours, theirs = (dict(tree_flatten(optimizer._optimizer.state)) for optimizer in (through, second))
    assert ours.keys() == theirs.keys()
    for entry, value in ours.items():
        assert value.dtype == theirs[entry].dtype
        assert mx.array_equal(value, theirs[entry]), entry


def test_state_of_another_adapter_or_optimizer_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    Optimizer(Student.load(tiny_student, None, LoraConfig(rank=2), seed=0), config()).save(path)
    for lora, name in ((LoraConfig(rank=3), "adamw"), (LoraConfig(rank=2), "sgd")):
        other = Optimizer(Student.load(tiny_student, None, lora, seed=0), config(optimizer=name))
        with pytest.raises(OpdError, match="holds no state") as caught:
            other.load(path)
        assert caught.value.reason == Reason.CHECKPOINT_NOT_FOUND


def test_a_fresh_adapter_moves_under_every_optimizer(tiny_student: Path) -> None:
    """Its second matrix is 0, so a rate scaled by a tensor's size would leave it where it is."""
    for name in OPTIONS:
        optimizer = Optimizer(
            Student.load(tiny_student, None, LoraConfig(rank=2), seed=0), config(optimizer=name, learning_rate=0.01)
        )
        updated(optimizer, range(1, 4))
        moved = [np.abs(np.array(v)).max() for n, v in optimizer.student.parameters().items() if n.endswith("lora_b")]
        assert min(moved) > 1e-3, name


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        ({"optimizer_options": {"beta": 0.9}}, "optimizer_options.beta", "optimizer adamw has no such option; it has"),
        ({"optimizer": "sgd", "optimizer_options": {"betas": [0.9, 0.99]}}, "optimizer_options.betas", "momentum"),
        ({"optimizer": "lion", "optimizer_options": {"betas": [0.9]}}, "optimizer_options.betas.1", "missing"),
        ({"optimizer_options": {"eps": 0}}, "optimizer_options.eps", "greater than 0"),
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": True}}, "optimizer_options", "needs a momentum"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay", "use adamw"),
        (
            {"optimizer": "adafactor", "optimizer_options": {"relative_step": True}},
            "optimizer_options.relative_step",
            "",
        ),
    ],
)
def test_wrong_options_are_named_before_anything_loads(settings: dict[str, Any], field: str, says: str) -> None:
    (fault,) = optimizer_faults(config(**settings))
    assert fault.field == f"config.{field}"
    assert says in fault.description
    with pytest.raises(OpdError) as caught:
        optimizer_settings(config(**settings))
    assert caught.value.reason == Reason.INVALID_RUN_CONFIG


def test_every_optimizer_of_the_configuration_is_there() -> None:
    assert set(OPTIONS) == set(KINDS) == set(get_args(OptimizerName))
