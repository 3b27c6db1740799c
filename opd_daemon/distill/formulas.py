"""The divergences as formulas on two distributions over the same outcomes, the whole vocabulary or K ids and a tail.

A formula says, for every outcome, its term of the sum, and its pull ∂D/∂log s up to a multiple of s, which the
student's normalisation takes out: the gradient with respect to the student's logits is pull − s·Σ pull. Each is
written once for numpy and MLX. T is the teacher, S the student; probabilities t, s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd_daemon.distill.logits import IMPOSSIBLE, Arrays

# Below every normal float32: stands for a mixture in which both sides have no mass.
LEAST_MASS = 1e-37
# A float32 tail of 1 − Σ that came out as nothing may have been this much; it keeps the reverse KL finite.
UNRESOLVED_TAIL = -17.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Teacher and student over O outcomes, `(N, O)` each: log-probabilities and probabilities."""

    log_t: Any
    t: Any
    log_s: Any
    s: Any


Formula = Callable[[Any, Pair], tuple[Any, Any]]


def forward_kl(_: Any, pair: Pair) -> tuple[Any, Any]:
    """KL(T ‖ S); its gradient is s − t."""
    return pair.t * (pair.log_t - pair.log_s), -pair.t


def reverse_kl(_: Any, pair: Pair) -> tuple[Any, Any]:
    """KL(S ‖ T); its gradient is s·(r − Σ s·r), r = log s/t."""
    terms = pair.s * (pair.log_s - pair.log_t)
    return terms, terms


def jsd(beta: float) -> Formula:
    """β·KL(T ‖ M) + (1−β)·KL(S ‖ M) with M = βT + (1−β)S (Agarwal et al. 2024, GKD, eq. 1).

    β = 0 and β = 1 stand for the forward and the reverse KL, to which JSD/β and JSD/(1−β) tend there.
    """
    if beta in {0.0, 1.0}:
        return reverse_kl if beta else forward_kl

    def formula(lib: Any, pair: Pair) -> tuple[Any, Any]:
        log_m = log_mass(lib, beta * pair.t + (1.0 - beta) * pair.s)
        pull = (1.0 - beta) * pair.s * (pair.log_s - log_m)
        return beta * pair.t * (pair.log_t - log_m) + pull, pull

    return formula


def skew_forward_kl(alpha: float) -> Formula:
    """KL(T ‖ αT + (1−α)S) (Ko et al. 2024, DistiLLM, eq. 3)."""
    if alpha == 0.0:
        return forward_kl

    def formula(lib: Any, pair: Pair) -> tuple[Any, Any]:
        mixture = lib.maximum(alpha * pair.t + (1.0 - alpha) * pair.s, LEAST_MASS)
        return pair.t * (pair.log_t - lib.log(mixture)), (alpha - 1.0) * pair.t * (pair.s / mixture)

    return formula


def skew_reverse_kl(alpha: float) -> Formula:
    """KL(S ‖ αS + (1−α)T) (Ko et al. 2024, DistiLLM, §3.1)."""
    if alpha == 0.0:
        return reverse_kl

    def formula(lib: Any, pair: Pair) -> tuple[Any, Any]:
        mixture = lib.maximum(alpha * pair.s + (1.0 - alpha) * pair.t, LEAST_MASS)
        terms = pair.s * (pair.log_s - lib.log(mixture))
        return terms, terms - alpha * pair.s * (pair.s / mixture)

    return formula


def total_variation(lib: Any, pair: Pair) -> tuple[Any, Any]:
    """½·Σ |s − t|; its complement is the share of the student's guesses that speculative decoding keeps."""
    gap = pair.s - pair.t
    return 0.5 * lib.abs(gap), 0.5 * pair.s * lib.sign(gap)


def softmax(arrays: Arrays, logits: Any, temperature: float) -> tuple[Any, Any]:
    """Log-probabilities and probabilities of logits `(N, V)` at a temperature: `(N, V)` both."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    if temperature != 1:
        shifted *= 1.0 / temperature
    mass = arrays.lib.exp(shifted)
    total = arrays.row_sum(mass)
    shifted -= arrays.lib.log(total)
    mass *= 1.0 / total
    return shifted, mass


def paired(arrays: Arrays, teacher: Any, student: Any, temperature: float) -> Pair:
    """Both distributions of logits `(N, V)` at a temperature."""
    return Pair(*softmax(arrays, teacher, temperature), *softmax(arrays, student, temperature))


def paired_outcomes(lib: Any, teacher: Any, student: Any) -> Pair:
    """Both distributions of log-probabilities of outcomes `(N, O)`.

    Where the teacher's mass was too small for float32, the log of the smallest such mass stands in.
    """
    known = teacher > IMPOSSIBLE
    log_t = lib.where(known, teacher, UNRESOLVED_TAIL)
    return Pair(log_t, lib.where(known, lib.exp(log_t), 0.0), student, lib.exp(student))


def log_mass(lib: Any, mass: Any) -> Any:
    """Logarithms of probabilities, finite where there is none."""
    return lib.log(lib.maximum(mass, LEAST_MASS))
