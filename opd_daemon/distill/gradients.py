"""Loss and gradient of one micro-batch, with memory that doesn't grow with rows times vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.distill.batches import MicroBatch
from opd_daemon.distill.head_loss import HeadGradient, head_gradient
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.planning import KEPT_ARRAYS, KEPT_BYTES
from opd_daemon.distill.student import Student

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainContext


@dataclass(frozen=True, slots=True, eq=False)
class BatchGradient:
    """Gradient of the summed loss, a tree shaped like the trainable parameters, and what is known of every token.

    loss: the sum; count: rows of the mask. values: name → `(N,)`, see `Objective` and `watch`.
    """

    gradients: Any
    loss: float
    count: float
    values: dict[str, npt.NDArray[np.float32]]
    batch: MicroBatch


def backward(context: TrainContext, batch: MicroBatch) -> BatchGradient:
    """Gradient of the run's objective, summed over the batch; dividing by the count is left to the optimizer step."""
    return gradient(context.student, batch, context.objective)


def gradient(student: Student, batch: MicroBatch, objective: Objective) -> BatchGradient:
    """Gradient of an objective's sum over the batch.

    The head is outside the gradient's graph: the loss's slope at the hidden states is found chunk by chunk, then
    pulled through the model. Where the graph of the forward is small it is kept meanwhile, else built a second time.
    """
    student.model.train()
    dropout_seed = int(mx.random.randint(0, 1 << 30))
    mx.random.seed(dropout_seed)
    found = None
    if batch.tokens.size * student.layers * student.hidden_size * KEPT_ARRAYS * 4 > KEPT_BYTES:
        found = head_gradient(student, student.states_at(batch.tokens, batch.places), batch.rows, objective)
        mx.random.seed(dropout_seed)

    def surrogate() -> tuple[mx.array, HeadGradient]:
        states = student.states_at(batch.tokens, batch.places)
        head = found or head_gradient(student, mx.stop_gradient(states), batch.rows, objective)
        return (states.astype(mx.float32) * head.slope).sum(), head

    (_, head), gradients = nn.value_and_grad(student.model, surrogate)()
    mx.eval(gradients)
    student.model.eval()
    values = {name: np.array(value) for name, value in head.values.items()}
    values["teacher_entropy"] = np.concatenate([target.entropies for target in batch.targets])
    return BatchGradient(gradients, float(head.loss), float(batch.rows.mask.sum()), values, batch)
