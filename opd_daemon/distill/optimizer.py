"""The optimizer, with a learning rate that is a function of the step alone: a resumed run goes on as it would have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import SGD, Adafactor, Adam, AdamW, Lion, Muon, clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from opd_daemon.distill.files import write_file
from opd_daemon.distill.optimizer_options import optimizer_settings
from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.distill.student import Student


KINDS = {"adamw": AdamW, "adam": Adam, "adafactor": Adafactor, "lion": Lion, "muon": Muon, "sgd": SGD}


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
    """One of mlx's optimizers over the student's adapter; gradients come clipped by their global norm."""

    def __init__(self, student: Student, config: RunConfig) -> None:
        self.student = student
        self.config = config
        kind: Any = KINDS[config.optimizer]
        self._optimizer = kind(learning_rate=config.learning_rate, **optimizer_settings(config))
        self._optimizer.init(student.parameters_tree())
        mx.eval(self._optimizer.state)

    def update(self, gradients: Any, step: int) -> None:
        """Apply one update with already clipped gradients, a tree shaped like the trainable parameters."""
        self._optimizer.learning_rate = learning_rate(step, self.config)
        self._optimizer.update(self.student.model, gradients)
        mx.eval(self.student.parameters_tree(), self._optimizer.state)

    def save(self, path: Path) -> None:
        """Write moments and counters to a safetensors file. Raises DISK_FULL as every write does."""
        from safetensors.numpy import save

        state = dict(tree_flatten(self._optimizer.state))
        write_file(path, save({name: np.array(tensor) for name, tensor in state.items()}))

    def load(self, path: Path) -> None:
        """Take moments and counters back.

        Raises:
            OpdError: CHECKPOINT_NOT_FOUND where they are another optimizer's or another adapter's.
        """
        loaded: Any = mx.load(str(path))
        own = dict(tree_flatten(self._optimizer.state))
        fits = loaded.keys() == own.keys() and all(loaded[name].shape == own[name].shape for name in own)
        if not fits:
            message = f"{path}: holds no state of optimizer {self.config.optimizer} for this adapter; start a new run"
            raise OpdError(Reason.CHECKPOINT_NOT_FOUND, message, path=path)
        self._optimizer.state = tree_unflatten(list(loaded.items()))
        mx.eval(self._optimizer.state)


def clipped(gradients: Any, max_norm: float) -> tuple[Any, float]:
    """Gradients scaled to a global norm of at most max_norm, and the norm they had."""
    clip: Any = clip_grad_norm
    gradients, norm = clip(gradients, max_norm)
    mx.eval(gradients, norm)
    return gradients, float(norm)
