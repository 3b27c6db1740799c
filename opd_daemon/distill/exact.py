"""Teacher and student compared over the whole vocabulary, row by row."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from opd_daemon.distill.logits import in_tiles, logsumexp, on_host, row_sum
from opd_daemon.types import Float32

NAMES = (
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "teacher_entropy",
    "student_entropy",
    "agreement",
    "top5_agreement",
)
LOG_2 = 0.6931472


def compare(teacher: mx.array, student: mx.array) -> dict[str, Float32]:
    """Divergences, entropies (nats) and agreement of logits `(N, V)` with equal masks: `{name: (N,)}` for `NAMES`."""
    table = in_tiles(_host_rows, teacher, student) if on_host() else _device_rows(teacher, student)
    columns = np.array(table)
    return {name: columns[:, place] for place, name in enumerate(NAMES)}


def _host_rows(teacher: Float32, student: Float32) -> Float32:
    log_t, log_s = _log_softmax(teacher), _log_softmax(student)
    t, s = np.exp(log_t), np.exp(log_s)
    gap = log_t - log_s
    # log of the mean of both, through the larger: no mass is lost where one of them is almost nothing
    log_m = np.maximum(log_t, log_s) + np.log1p(np.exp(-np.abs(gap))) - np.float32(LOG_2)
    favourite = log_t.argmax(axis=-1)[:, None]
    rank = (log_s > np.take_along_axis(log_s, favourite, axis=-1)).sum(axis=-1)
    columns = [
        (t * gap).sum(axis=-1),
        -(s * gap).sum(axis=-1),
        0.5 * ((t * (log_t - log_m)).sum(axis=-1) + (s * (log_s - log_m)).sum(axis=-1)),
        -(t * log_t).sum(axis=-1),
        -(s * log_s).sum(axis=-1),
        rank == 0,
        rank < 5,
    ]
    return np.stack(columns, axis=-1).astype(np.float32)


def _log_softmax(logits: Float32) -> Float32:
    shifted: Float32 = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _device_rows(teacher: mx.array, student: mx.array) -> mx.array:
    log_t, log_s = teacher - logsumexp(teacher), student - logsumexp(student)
    t, s = mx.exp(log_t), mx.exp(log_s)
    gap = log_t - log_s
    log_m = mx.logaddexp(log_t, log_s) - LOG_2
    favourite = log_t.argmax(axis=-1, keepdims=True)
    rank = row_sum((log_s > mx.take_along_axis(log_s, favourite, axis=-1)).astype(mx.float32))
    columns = [
        row_sum(t * gap),
        -row_sum(s * gap),
        0.5 * (row_sum(t * (log_t - log_m)) + row_sum(s * (log_s - log_m))),
        -row_sum(t * log_t),
        -row_sum(s * log_s),
        (rank == 0).astype(mx.float32),
        (rank < 5).astype(mx.float32),
    ]
    return mx.concatenate(columns, axis=-1)
