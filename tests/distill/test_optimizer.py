"""Learning rates and the optimizer's state."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten

from opd_daemon.config import LoraConfig, RunConfig, parse_config
from opd_daemon.distill.optimizer import Optimizer, clipped, learning_rate
from opd_daemon.distill.student import Student


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


def test_saved_state_goes_on_exactly(tiny_student: Path, tmp_path: Path) -> None:
    def updated(optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            mx.random.seed(step)
            noise = {name: mx.random.normal(value.shape) for name, value in optimizer.student.parameters().items()}
            optimizer.update(tree_unflatten(list(noise.items())), step)

    through = Optimizer(Student.load(tiny_student, None, LoraConfig(rank=2), seed=0), config(weight_decay=0.1))
    updated(through, range(1, 7))

    first = Optimizer(Student.load(tiny_student, None, LoraConfig(rank=2), seed=0), config(weight_decay=0.1))
    updated(first, range(1, 4))
    first.student.save_adapter(tmp_path)
    first.save(tmp_path / "optimizer.safetensors")
    second = Optimizer(Student.load(tiny_student, tmp_path, LoraConfig(), seed=5), config(weight_decay=0.1))
    second.load(tmp_path / "optimizer.safetensors")
    updated(second, range(4, 7))
    for name, value in through.student.parameters().items():
        assert mx.array_equal(value, second.student.parameters()[name]), name
