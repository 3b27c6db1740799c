"""Loss and gradient of one micro-batch, with memory that doesn't grow with rows times vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.distill.batches import MicroBatch, Rows
from opd_daemon.distill.objective import Objective, TokenValues, watch
from opd_daemon.distill.planning import CHUNK_BYTES, KEPT_ARRAYS, KEPT_BYTES
from opd_daemon.distill.student import Student


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


@dataclass(frozen=True, slots=True, eq=False)
class HeadGradient:
    """Summed loss, values per token, and slope: the loss's gradient with respect to the states `(N, D)`, float32."""

    loss: mx.array
    values: TokenValues
    slope: mx.array


def backward(student: Student, batch: MicroBatch, objective: Objective) -> BatchGradient:
    """Gradient of the objective's sum over the batch; dividing by the count is left to the optimizer step.

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


def head_gradient(student: Student, states: mx.array, rows: Rows, objective: Objective) -> HeadGradient:
    """Loss and slope at the hidden states `(N, D)`, evaluated a chunk at a time, so one chunk's logits are alive."""

    def loss(chunk: mx.array, part: Rows) -> tuple[mx.array, TokenValues]:
        logits = student.head(chunk)
        total, values = objective(logits, part)
        return total, values | watch(logits, part)

    mx.eval(states)
    gradient = mx.value_and_grad(loss)
    size = max(16, CHUNK_BYTES // (student.width * 4))
    totals, parts, slopes = [], [], []
    for start in range(0, len(rows), size):
        (total, values), slope = gradient(states[start : start + size], rows.part(start, start + size))
        mx.eval(total, values, slope)
        totals.append(total)
        parts.append(values)
        slopes.append(slope.astype(mx.float32))
    joined = {name: mx.concatenate([values[name] for values in parts]) for name in parts[0]}
    return HeadGradient(mx.stack(totals).sum(), joined, mx.concatenate(slopes))
