"""Loss and gradient of one micro-batch, with memory that doesn't grow with rows times vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_unflatten
from psutil import virtual_memory

from opd_daemon.distill.activations import block_bytes, kept_blocks
from opd_daemon.distill.batches import MicroBatch
from opd_daemon.distill.head_loss import head_gradient
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.student import Student
from opd_daemon.distill.tape import Tape, plain_gradients, record

if TYPE_CHECKING:
    from opd_daemon.config import Backward
    from opd_daemon.trainer import TrainContext


@dataclass(frozen=True, slots=True, eq=False)
class BatchGradient:
    """Gradient of the summed loss, a tree shaped like the trainable parameters, and what is known of every token.

    loss: the sum; count: what it is a sum of, tokens or sequences. values: name → `(N,)`, see `Objective` and `watch`.
    """

    gradients: Any
    loss: float
    count: float
    values: dict[str, npt.NDArray[np.float32]]
    batch: MicroBatch


def backward(context: TrainContext, batch: MicroBatch) -> BatchGradient:
    """Gradient of the run's objective, summed over the batch; dividing by the count is left to the optimizer step."""
    config = context.config
    return gradient(context.student, batch, context.objective, config.backward, config.worker_memory_limit_bytes)


def gradient(
    student: Student, batch: MicroBatch, objective: Objective, mode: Backward = "auto", memory_bytes: int = 0
) -> BatchGradient:
    """Gradient of an objective's sum over the batch.

    The head is outside the gradient's graph: the loss's slope at the hidden states is found chunk by chunk, then
    pulled through the model. `mode` says what the forward keeps for that (see `activations`), with `memory_bytes` to
    share, 0 for the machine's; it changes neither loss nor gradient.
    """
    seed = int(mx.random.randint(0, 1 << 30))  # before `blocks`, whose first use probes the model with random numbers
    blocks = student.blocks
    student.model.train()
    if blocks:
        sequences, length = batch.tokens.shape
        each = block_bytes(student.shape, sequences, length, student.adapter, on_host=on_host())
        kept = kept_blocks(mode, len(blocks) - blocks.first, each, memory_bytes or virtual_memory().total)
        tape = record(blocks, batch.tokens, batch.places, kept=kept, seed=seed)
    else:
        tape = _whole(student, batch, seed)
    head = head_gradient(student, tape.states, batch.rows, objective)
    gradients = tree_unflatten(list(tape.pull(head.slope).items()))
    mx.random.seed(seed)  # what comes next is the same, whatever was kept
    student.model.eval()
    values = {name: np.array(value) for name, value in head.values.items()}
    return BatchGradient(gradients, float(head.loss), batch.count, values, batch)


def _whole(student: Student, batch: MicroBatch, seed: int) -> Tape:
    """A model whose blocks can't be driven runs twice: once for its states, once for their gradient."""
    mx.random.seed(seed)
    states = student.states_at(batch.tokens, batch.places)
    mx.eval(states)

    def pull(slope: mx.array) -> dict[str, mx.array]:
        mx.random.seed(seed)
        return plain_gradients(student.model, student.hidden, batch.tokens, batch.places, lambda _: slope)[1]

    return Tape(states, pull)
