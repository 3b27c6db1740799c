"""Divergences between teacher and student over a sparse support that never forgets the rest.

Each distribution is reduced to K+1 outcomes: K named ids and "anything else", the *tail*. By the data-processing
inequality the reduced divergence lies between 0 and the exact one, and equals it when the tail is empty. Student
logits are `(N, V)` float32 with impossible ids masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from opd_daemon.distill.logits import IMPOSSIBLE, log1mexp
from opd_daemon.distill.outcomes import student_outcomes

# A float32 tail of 1 − Σ that came out as nothing may have been this much; it keeps the reverse KL finite.
UNRESOLVED_TAIL = -17.0


@dataclass(frozen=True, slots=True, eq=False)
class SparseSignal:
    """A teacher's distribution at N positions, at one temperature.

    ids (N, K) int32: −1 fills unused places, the first place is always used, no id twice.
    logprobs (N, K) float32, −inf at unused places. tail (N,): log of the mass outside the ids, −inf for none.
    """

    ids: mx.array
    logprobs: mx.array
    tail: mx.array

    def outcomes(self) -> mx.array:
        """Log-probabilities of the K ids and the tail: `(N, K+1)`."""
        return mx.concatenate([self.logprobs, self.tail[:, None]], axis=-1)

    def rows(self, start: int, stop: int) -> SparseSignal:
        """The positions start … stop−1."""
        return SparseSignal(self.ids[start:stop], self.logprobs[start:stop], self.tail[start:stop])


def at_temperature(plain: SparseSignal, log_z: mx.array, temperature: float) -> SparseSignal:
    """The signal at a temperature, from that at temperature 1 and log_z `(N,)` = log Σ_v exp(logprob_v / T).

    The tail is what the ids leave of 1, as its mass at T can't be had from its mass at 1; nothing stays nothing.
    """
    tempered = plain.logprobs / temperature - log_z[:, None]
    rest = log1mexp(mx.logsumexp(tempered, axis=-1))
    return SparseSignal(plain.ids, tempered, mx.where(plain.tail > IMPOSSIBLE, rest, plain.tail))


class Divergence(Protocol):
    """A loss between the teacher's signal and the student's logits."""

    @property
    def temperature(self) -> float:
        """Temperature of both distributions."""
        ...

    def per_token(self, logits: mx.array, signal: SparseSignal) -> mx.array:
        """Divergence in nats at every position, without the T² factor: `(N,)`."""
        ...

    def __call__(self, logits: mx.array, signal: SparseSignal, mask: mx.array) -> tuple[mx.array, mx.array]:
        """Sum over the positions where mask `(N,)` is 1, times T², and the number of those positions."""
        ...


@dataclass(frozen=True, slots=True)
class SparseDivergence:
    """A divergence given by a formula on outcomes, both distributions at `temperature`.

    The sum carries T², which keeps the gradient's size as the temperature changes (Hinton et al. 2015, §2.1).
    """

    formula: Callable[[mx.array, mx.array], mx.array]
    temperature: float = 1.0

    def per_token(self, logits: mx.array, signal: SparseSignal) -> mx.array:
        """Divergence in nats at every position, without the T² factor: `(N,)`."""
        return self.formula(signal.outcomes(), student_outcomes(logits, signal.ids, self.temperature))

    def __call__(self, logits: mx.array, signal: SparseSignal, mask: mx.array) -> tuple[mx.array, mx.array]:
        """Sum over the positions where mask `(N,)` is 1, times T², and the number of those positions."""
        return (self.per_token(logits, signal) * mask).sum() * self.temperature**2, mask.sum()


def forward_kl(teacher: mx.array, student: mx.array) -> mx.array:
    """KL(teacher ‖ student) of outcome log-probabilities `(N, O)`: `(N,)`. Its gradient is s − t."""
    possible = teacher > IMPOSSIBLE
    gap = mx.where(possible, teacher, 0.0) - mx.where(possible, student, 0.0)
    return (mx.exp(teacher) * gap).sum(axis=-1)


def reverse_kl(teacher: mx.array, student: mx.array) -> mx.array:
    """KL(student ‖ teacher) of outcome log-probabilities `(N, O)`: `(N,)`. Its gradient is s·(r − Σ s·r), r = log s/t.

    Where the teacher's mass was too small for float32, the log of the smallest such mass stands in.
    """
    known = mx.where(teacher > IMPOSSIBLE, teacher, UNRESOLVED_TAIL)
    return (mx.exp(student) * (student - known)).sum(axis=-1)


def js_divergence(teacher: mx.array, student: mx.array) -> mx.array:
    """Jensen–Shannon divergence of outcome log-probabilities `(N, O)`: `(N,)`, at most log 2."""
    student = mx.maximum(student, IMPOSSIBLE)
    teacher = mx.maximum(teacher, IMPOSSIBLE)
    middle = mx.logaddexp(teacher, student) - 0.6931472
    gaps = mx.exp(teacher) * (teacher - middle) + mx.exp(student) * (student - middle)
    return 0.5 * gaps.sum(axis=-1)


FORMULAS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def get(name: str, *, temperature: float = 1.0) -> Divergence:
    """The divergence of that name (`forward_kl`, `reverse_kl`). Raises KeyError for another name."""
    return SparseDivergence(FORMULAS[name], temperature)


def ce_per_token(logits: mx.array, labels: mx.array) -> mx.array:
    """Cross-entropy in nats of labels `(N,)` under logits `(N, V)` at temperature 1: `(N,)`."""
    return -student_outcomes(logits, labels[:, None])[:, 0]


def ce(logits: mx.array, labels: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy over the positions where mask `(N,)` is 1, and the number of those positions."""
    return (ce_per_token(logits, labels) * mask).sum(), mask.sum()
