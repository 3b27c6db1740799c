"""Loss and its slope at the student's hidden states, with memory that doesn't grow with rows times vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from opd_daemon.distill.batches import Rows
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.objective import Objective, TokenValues
from opd_daemon.distill.planning import CHUNK_BYTES
from opd_daemon.distill.student import Student

# Matrix products of a multiple of so many rows are the fast ones: of 48, a quarter faster than of 47 on x86.
ROW_TILE = 16


@dataclass(frozen=True, slots=True, eq=False)
class HeadGradient:
    """Summed loss, values per token, and slope: the loss's gradient with respect to the states `(N, D)`, float32."""

    loss: mx.array
    values: TokenValues
    slope: mx.array


def head_gradient(student: Student, states: mx.array, rows: Rows, objective: Objective) -> HeadGradient:
    """Loss and slope at the hidden states `(N, D)`.

    A chunk of rows is evaluated at a time: the student's logits, from which the objective computes their gradient in
    closed form (where the teacher's logits are needed, they are alive meanwhile), then that gradient pulled back
    through the head alone. So no graph holds any logits, and on a CPU the gradient takes their place in memory.
    """
    mx.eval(states)
    losses, parts, slopes = [], [], []
    for start, fresh, stop in _chunks(len(rows), CHUNK_BYTES // (student.width * 4)):
        chunk = states[start:stop]
        logits = student.head(chunk)
        mx.eval(logits)
        reuse = not _share_memory(logits, chunk)
        loss, values, pull = objective.gradient(logits, rows.part(start, stop, fresh), reuse=reuse)
        mx.eval(loss, values, pull)
        del logits
        _, (slope,) = mx.vjp(student.head, [chunk], [pull])
        del pull
        slopes.append(slope[fresh - start :].astype(mx.float32))
        mx.eval(slopes[-1])
        losses.append(loss)
        parts.append({name: value[-(stop - fresh) :] for name, value in values.items()})
    names = {name: None for values in parts for name in values}
    joined = {name: mx.concatenate([values[name] for values in parts if name in values]) for name in names}
    return HeadGradient(mx.stack(losses).sum(), joined, mx.concatenate(slopes))


def _chunks(count: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Start, first row that is new, and stop of chunks of equal size: whole tiles, at most `most` rows or one tile.

    Where they don't divide the rows, the last one begins with rows of the one before: buffers of another size would be
    taken anew while MLX keeps the freed ones.
    """
    tiles = -(-count // ROW_TILE)
    chunks = -(-tiles // max(1, most // ROW_TILE))
    size = min(count, -(-tiles // chunks) * ROW_TILE)
    for fresh in range(0, count, size):
        stop = min(fresh + size, count)
        yield stop - size, fresh, stop


def _share_memory(logits: mx.array, states: mx.array) -> bool:
    """Whether the head gave its input back, as that of a model which can't be split does."""
    return not on_host() or (states.dtype == mx.float32 and np.may_share_memory(np.asarray(logits), np.asarray(states)))
