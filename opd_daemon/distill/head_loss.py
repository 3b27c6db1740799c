"""Loss and its slope at the student's hidden states, with memory that doesn't grow with rows times vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from opd_daemon.distill.batches import Rows
from opd_daemon.distill.objective import Objective, TokenValues, watch
from opd_daemon.distill.planning import CHUNK_BYTES
from opd_daemon.distill.student import Student


@dataclass(frozen=True, slots=True, eq=False)
class HeadGradient:
    """Summed loss, values per token, and slope: the loss's gradient with respect to the states `(N, D)`, float32."""

    loss: mx.array
    values: TokenValues
    slope: mx.array


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
