"""What a trainer minimises: a divergence mixed with cross-entropy, and the numbers watched beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from opd_daemon.distill import divergences
from opd_daemon.distill.divergences import Divergence
from opd_daemon.distill.logits import entropy, top_ids
from opd_daemon.distill.outcomes import student_outcomes

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.distill.batches import Rows

TokenValues = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Objective:
    """kl_weight · T² · divergence + ce_weight · cross-entropy, summed over the rows of the mask."""

    divergence: Divergence
    kl_weight: float
    ce_weight: float

    @classmethod
    def from_config(cls, config: RunConfig) -> Objective:
        """The objective a run's configuration asks for."""
        divergence = divergences.get(config.divergence, temperature=config.temperature)
        return cls(divergence, config.kl_weight, config.ce_weight)

    def __call__(self, logits: mx.array, rows: Rows) -> tuple[mx.array, TokenValues]:
        """Loss summed over the rows, and its parts per token: logits `(N, V)` → `(), {name: (N,)}`."""
        values: TokenValues = {}
        loss = mx.zeros(())
        if self.kl_weight:
            values["kl"] = self.divergence.per_token(logits, rows.signal)
            loss = loss + self.kl_weight * self.divergence.temperature**2 * (values["kl"] * rows.mask).sum()
        if self.ce_weight:
            values["ce"] = divergences.ce_per_token(logits, rows.labels)
            loss = loss + self.ce_weight * (values["ce"] * rows.mask).sum()
        return loss, {name: mx.stop_gradient(value) for name, value in values.items()}


def watch(logits: mx.array, rows: Rows) -> TokenValues:
    """Per-token numbers at temperature 1 that nothing is trained on: logits `(N, V)` → `{name: (N,)}`.

    forward_kl, reverse_kl, js_divergence over the sparse support with its tail; student_entropy over the whole
    vocabulary; agreement and top5_agreement as 0 or 1.
    """
    logits = mx.stop_gradient(logits)
    student = student_outcomes(logits, rows.plain_signal.ids)
    teacher = rows.plain_signal.outcomes()
    best = top_ids(logits, 5) == rows.teacher_top[:, None]
    return {
        "forward_kl": divergences.forward_kl(teacher, student),
        "reverse_kl": divergences.reverse_kl(teacher, student),
        "js_divergence": divergences.js_divergence(teacher, student),
        "student_entropy": entropy(logits),
        "agreement": best[:, 0].astype(mx.float32),
        "top5_agreement": best.any(axis=-1).astype(mx.float32),
    }
