"""Adam with a learning rate that is a function of the step alone, so a resumed run goes on exactly as it would have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from opd_daemon.distill.files import write_file

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.distill.student import Student


def learning_rate(step: int, config: RunConfig) -> float:
    """Rate of step 1 … num_steps: a linear warm-up, then cosine or linear decay towards 0, or constant."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps - 1) / max(1, config.num_steps - config.warmup_steps)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate


class Optimizer:
    """AdamW with bias correction over the student's adapter, gradients clipped by their global norm."""

    def __init__(self, student: Student, config: RunConfig) -> None:
        self.student = student
        self.config = config
        self._adam = AdamW(config.learning_rate, weight_decay=config.weight_decay, bias_correction=True)
        self._adam.init(student.parameters_tree())
        mx.eval(self._adam.state)

    def update(self, gradients: Any, step: int) -> None:
        """Apply one update with already clipped gradients, a tree shaped like the trainable parameters."""
        self._adam.learning_rate = learning_rate(step, self.config)
        self._adam.update(self.student.model, gradients)
        mx.eval(self.student.parameters_tree(), self._adam.state)

    def save(self, path: Path) -> None:
        """Write moments and counters to a safetensors file. Raises DISK_FULL as every write does."""
        from safetensors.numpy import save

        state = dict(tree_flatten(self._adam.state))
        write_file(path, save({name: np.array(tensor) for name, tensor in state.items()}))

    def load(self, path: Path) -> None:
        """Take moments and counters back."""
        stored: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        self._adam.state = tree_unflatten(list(stored.items()))
        mx.eval(self._adam.state)


def clipped(gradients: Any, max_norm: float) -> tuple[Any, float]:
    """Gradients scaled to a global norm of at most max_norm, and the norm they had."""
    clip: Any = clip_grad_norm
    gradients, norm = clip(gradients, max_norm)
    mx.eval(gradients, norm)
    return gradients, float(norm)
