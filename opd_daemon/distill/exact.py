"""Teacher and student compared over the whole vocabulary, row by row."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from opd_daemon.arrays import Float32
from opd_daemon.distill.formulas import Pair, log_mass, paired
from opd_daemon.distill.logits import DEVICE, HOST, Arrays, in_tiles, on_host

NAMES = (
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "teacher_entropy",
    "student_entropy",
    "agreement",
    "top5_agreement",
    "acceptance",
)


def compare(teacher: mx.array, student: mx.array) -> dict[str, Float32]:
    """Divergences, entropies (nats) and agreement of logits `(N, V)` with equal masks: `{name: (N,)}` for `NAMES`.

    acceptance: Σ min(student, teacher), the share of the student's guesses that speculative decoding would keep.
    """
    if on_host():
        table = in_tiles(_host_rows, teacher, student, width=len(NAMES))
    else:
        table = mx.concatenate(columns(DEVICE, paired(DEVICE, teacher, student, 1.0)), axis=-1)
    values = np.array(table)
    return {name: values[:, place] for place, name in enumerate(NAMES)}


def columns(arrays: Arrays, pair: Pair) -> list[Any]:
    """The columns `(N, 1)` of `NAMES` for two whole distributions."""
    lib, dot = arrays.lib, arrays.row_dot
    gap = pair.log_t - pair.log_s
    ours, theirs = (log.argmax(axis=-1, keepdims=True) for log in (pair.log_s, pair.log_t))
    rank = arrays.row_count(pair.log_s > lib.take_along_axis(pair.log_s, theirs, axis=-1))
    forward_kl = dot(pair.t, gap)
    mixture = 0.5 * (pair.t + pair.s)
    return [
        forward_kl,
        -dot(pair.s, gap),
        # Half the forward KL less KL(M ‖ S), by the compensation identity: one logarithm, and a third of the passes.
        0.5 * forward_kl + dot(mixture, pair.log_s - log_mass(lib, mixture)),
        -dot(pair.t, pair.log_t),
        -dot(pair.s, pair.log_s),
        (ours == theirs).astype(lib.float32),  # not rank 0: in 16 bits the student often has two favourites
        (rank < 5).astype(lib.float32),
        arrays.row_sum(lib.minimum(pair.t, pair.s)),
    ]


def _host_rows(teacher: Float32, student: Float32) -> Float32:
    return np.concatenate(columns(HOST, paired(HOST, teacher, student, 1.0)), axis=-1)
