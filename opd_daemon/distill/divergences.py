"""Divergences between teacher and student, from any of three signals, with their gradients in closed form.

    loss = divergences.get("jsd", temperature=2.0, beta=0.1)
    total, count = loss(student_logits, ExactSignal(teacher_logits), mask)
    total, count, slopes = loss.gradient(student_logits, teacher_logits, mask)

Sparse signals reduce each distribution to K+1 outcomes: K named ids and "anything else", the *tail*. By the
data-processing inequality the reduced divergence lies between 0 and the exact one, and equals it when the tail is
empty. Sampled signals estimate the reverse KL from single tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from opd_daemon.distill import formulas, registry
from opd_daemon.distill.formulas import Formula, Pair, paired, paired_outcomes
from opd_daemon.distill.logits import DEVICE, HOST, IMPOSSIBLE, Arrays, host_view, on_host, over_tiles
from opd_daemon.distill.outcomes import outcome_slopes, student_outcomes
from opd_daemon.distill.signals import ExactSignal, SampledSignal, Signal, SparseSignal, at_temperature
from opd_daemon.errors import OpdError, Reason

__all__ = [
    "Divergence",
    "ExactSignal",
    "SampledSignal",
    "Signal",
    "SparseSignal",
    "at_temperature",
    "built_in",
    "ce",
    "ce_per_token",
    "get",
]


def get(name: str, *, temperature: float = 1.0, signal: str | None = None, **options: Any) -> Divergence:
    """The divergence of that name, both distributions at `temperature`.

    signal: the only kind it will be given ("exact", "sparse", "sampled"); None decides by what it is given.

    Raises:
        OpdError: INVALID_RUN_CONFIG, with the reason, for a name, options or a signal that don't go.
    """
    divergence: Divergence = registry.create(registry.find(name), options, temperature=temperature, signal=signal)
    return divergence


class Divergence:
    """A loss between a teacher's signal and the student's logits `(N, V)`.

    A divergence of your own has `values`, in nats, differentiable by MLX; `slopes` too where a closed form is faster.
    Sums carry T², which keeps the gradient's size as the temperature changes (Hinton et al. 2015, §2.1).
    token_clip: a token's largest value; above it, it has no gradient.
    """

    signal: str | None = None

    def __init__(self, name: str, temperature: float = 1.0, token_clip: float | None = None) -> None:
        self.name = name
        self.temperature = temperature
        self.token_clip = token_clip

    def values(self, logits: mx.array, signal: Any) -> mx.array:
        """Divergence in nats at every position, before clipping: `(N,)`."""
        raise NotImplementedError

    def slopes(self, logits: mx.array, signal: Any) -> tuple[mx.array, mx.array]:
        """`values` (N,), and the gradient of each with respect to its logits (N, V)."""
        (values,), (slopes,) = mx.vjp(lambda moved: self.values(moved, signal), [logits], [mx.ones((len(logits),))])
        return values, slopes

    def per_token(self, logits: mx.array, signal: Any) -> mx.array:
        """Divergence in nats at every position, without the T² factor: `(N,)`."""
        return self.clipped(self.values(*self._prepared(logits, signal)))[0]

    def __call__(self, logits: mx.array, signal: Any, mask: mx.array) -> tuple[mx.array, mx.array]:
        """Sum over the positions where mask `(N,)` is 1, times T², and the number of those positions."""
        values = mx.where(mask > 0, self.per_token(logits, signal), 0.0)
        return (values * mask).sum() * self.temperature**2, mask.sum()

    def gradient(self, logits: mx.array, signal: Any, mask: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Sum and count as by calling, and the sum's gradient with respect to the logits: `(), (), (N, V)`."""
        values, slopes = self.slopes(*self._prepared(logits, signal))
        kept, clipped = self.clipped(values)
        factors = mx.where(clipped, 0.0, mask * self.temperature**2)
        total = mx.where(mask > 0, kept * mask, 0.0).sum() * self.temperature**2
        return total, mask.sum(), mx.where(factors[:, None] > 0, slopes * factors[:, None], 0.0)

    def clipped(self, values: mx.array) -> tuple[mx.array, mx.array]:
        """Values (N,) with clipping, and which of them were clipped."""
        if self.token_clip is None:
            return values, mx.zeros(values.shape, dtype=mx.bool_)
        clipped = mx.abs(values) > self.token_clip
        return mx.where(clipped, self.token_clip * mx.sign(values), values), clipped

    def _prepared(self, logits: mx.array, signal: Any) -> tuple[mx.array, Any]:
        """Logits and signal with −inf, as some mask ids, replaced by a number that no arithmetic turns into NaN."""
        if isinstance(signal, mx.array):
            signal = ExactSignal(signal)
        kind = KINDS.get(type(signal))
        if self.signal not in {None, kind}:
            raise TypeError(f"divergence {self.name} was made for the signal {self.signal}, not for {kind}")
        if isinstance(signal, ExactSignal):
            signal = ExactSignal(mx.maximum(signal.logits.astype(mx.float32), IMPOSSIBLE))
        return mx.maximum(logits.astype(mx.float32), IMPOSSIBLE), signal


KINDS: dict[type[Any], str] = {ExactSignal: "exact", SparseSignal: "sparse", SampledSignal: "sampled"}


class FormulaDivergence(Divergence):
    """A divergence given by a formula on outcomes: the whole vocabulary, or K ids and the tail.

    renormalised: with a sparse signal, both sides are scaled to 1 over the ids and the tail is forgotten.
    """

    def __init__(
        self,
        name: str,
        formula: Formula,
        temperature: float = 1.0,
        token_clip: float | None = None,
        *,
        renormalised: bool = False,
    ) -> None:
        super().__init__(name, temperature, token_clip)
        self.formula = formula
        self.renormalised = renormalised
        self._exact = self._differentiable()

    def values(self, logits: mx.array, signal: Any) -> mx.array:
        """Divergence in nats at every position, before clipping: `(N,)`."""
        if isinstance(signal, ExactSignal):
            exact: mx.array = self._exact(logits, signal.logits)
            return exact
        if isinstance(signal, SparseSignal):
            student = student_outcomes(logits, signal.ids, self.temperature)
            reduced: mx.array = self.formula(mx, self._paired(signal, student))[0].sum(axis=-1)
            return reduced
        raise self._refusal(signal)

    def slopes(self, logits: mx.array, signal: Any) -> tuple[mx.array, mx.array]:
        """`values` (N,), and the gradient of each with respect to its logits (N, V)."""
        if isinstance(signal, ExactSignal):
            return self._exact_slopes(logits, signal.logits)
        if isinstance(signal, SparseSignal):
            student = student_outcomes(logits, signal.ids, self.temperature)
            pair = self._paired(signal, student)
            terms, pull = self.formula(mx, pair)
            if self.renormalised:
                pull = pull - pair.s * pull.sum(axis=-1, keepdims=True)
                pull = mx.concatenate([pull, mx.zeros((len(logits), 1))], axis=-1)
            return terms.sum(axis=-1), outcome_slopes(logits, signal.ids, student, pull, self.temperature)
        raise self._refusal(signal)

    def rows(self, arrays: Arrays, pair: Pair) -> tuple[Any, Any]:
        """Values `(N, 1)` and slopes `(N, V)` of two whole distributions at this temperature."""
        terms, pull = self.formula(arrays.lib, pair)
        values = arrays.row_sum(terms)
        slopes = pull - pair.s * (values if pull is terms else arrays.row_sum(pull))
        return values, slopes if self.temperature == 1 else slopes * (1.0 / self.temperature)

    def _paired(self, signal: SparseSignal, student: mx.array) -> Pair:
        teacher = signal.outcomes()
        if self.renormalised:
            teacher, student = teacher[:, :-1], student[:, :-1]
            teacher = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
            student = student - mx.logsumexp(student, axis=-1, keepdims=True)
        return paired_outcomes(mx, teacher, student)

    def _exact_slopes(self, logits: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
        if not on_host():
            values, slopes = self.rows(DEVICE, paired(DEVICE, teacher, logits, self.temperature))
            return values[:, 0], slopes
        values, slopes = mx.zeros((len(logits),)), mx.zeros(logits.shape)
        value_view, slope_view = host_view(values), host_view(slopes)
        student_view, teacher_view = host_view(logits), host_view(teacher)

        def tile(rows: slice) -> None:
            pair = paired(HOST, teacher_view[rows], student_view[rows], self.temperature)
            column, slope_view[rows] = self.rows(HOST, pair)
            value_view[rows] = column[:, 0]

        over_tiles(tile, *logits.shape)
        return values, slopes

    def _differentiable(self) -> Any:
        """`values` of an exact signal for MLX's autodiff, which gets the closed form."""

        @mx.custom_function
        def values(logits: mx.array, teacher: mx.array) -> mx.array:
            return self._exact_slopes(logits, teacher)[0]

        @values.vjp
        def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
            slopes = self._exact_slopes(*primals)[1]
            return slopes * cotangent[:, None], mx.zeros_like(primals[1])

        return values

    def _refusal(self, signal: Any) -> OpdError:
        kind = KINDS.get(type(signal), type(signal).__name__)
        message = f"divergence {self.name} can't be had from the signal {kind}: {registry.NOT_SAMPLED}"
        return OpdError(Reason.INVALID_RUN_CONFIG, message, divergence=self.name)


class ReverseKl(FormulaDivergence):
    """The reverse KL, also from tokens the student sampled.

    A sampled token y has the value log s(y) − log t(y), whose mean over samples is the reverse KL, and as gradient the
    score function's (log s − log t − b)·∇log s(y), whose mean is the reverse KL's gradient for every b that doesn't
    depend on y. baseline: b is the mean of the value, the reverse KL itself, in closed form from the support the
    signal brings (Oh et al. 2026, arXiv:2605.07865); what all tokens of a position share makes no noise any more.
    importance_clip: tokens of an older student are weighed by s / behaviour, at most this (truncated importance
    sampling); above it the weight stays there.
    """

    def __init__(self, options: registry.ReverseKlOptions, temperature: float) -> None:
        renormalised = options.tail == "renormalised"
        super().__init__("reverse_kl", formulas.reverse_kl, temperature, options.token_clip, renormalised=renormalised)
        self.baseline = options.baseline == "value"
        self.importance_clip = options.importance_clip

    def values(self, logits: mx.array, signal: Any) -> mx.array:
        """Divergence in nats at every position, before clipping: `(N,)`."""
        if not isinstance(signal, SampledSignal):
            return super().values(logits, signal)
        student = student_outcomes(logits, signal.tokens[:, None], self.temperature)[:, 0]
        value, advantage = self._estimate(mx.stop_gradient(logits), mx.stop_gradient(student), signal)
        return value + advantage * (student - mx.stop_gradient(student))

    def slopes(self, logits: mx.array, signal: Any) -> tuple[mx.array, mx.array]:
        """`values` (N,), and the gradient of each with respect to its logits (N, V)."""
        if not isinstance(signal, SampledSignal):
            return super().slopes(logits, signal)
        ids = signal.tokens[:, None]
        student = student_outcomes(logits, ids, self.temperature)
        value, advantage = self._estimate(logits, student[:, 0], signal)
        pull = mx.stack([advantage, mx.zeros(advantage.shape)], axis=-1)
        return value, outcome_slopes(logits, ids, student, pull, self.temperature)

    def clipped_weights(self, logits: mx.array, signal: SampledSignal) -> mx.array:
        """Which tokens `(N,)` have an importance weight at its limit."""
        if self.importance_clip is None:
            return mx.zeros((len(logits),), dtype=mx.bool_)
        student = student_outcomes(logits, signal.tokens[:, None], self.temperature)[:, 0]
        return self._ratios(student, signal) > self.importance_clip

    def _estimate(self, logits: mx.array, student: mx.array, signal: SampledSignal) -> tuple[mx.array, mx.array]:
        """Value and factor of ∇log s at every token: `(N,)` both."""
        value = student - mx.maximum(signal.teacher_logprobs, IMPOSSIBLE)
        advantage = value
        if self.baseline:
            if signal.support is None:
                message = "baseline 'value' needs the teacher's distribution, in full or on its top ids: give a support"
                raise OpdError(Reason.INVALID_RUN_CONFIG, message)
            advantage = value - super().values(logits, signal.support)
        if self.importance_clip is None:
            return value, advantage
        weights = mx.minimum(self._ratios(student, signal), self.importance_clip)
        return weights * value, weights * advantage

    def _ratios(self, student: mx.array, signal: SampledSignal) -> mx.array:
        if signal.behaviour_logprobs is None:
            message = "importance_clip needs the log-probabilities under the student that sampled; record them"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message)
        return mx.exp(student - signal.behaviour_logprobs)


def built_in(name: str, options: Any, temperature: float) -> Divergence:
    """One of `registry.BUILT_IN`, from its options."""
    if name == "reverse_kl":
        return ReverseKl(options, temperature)
    if name == "jsd":
        formula = formulas.jsd(options.beta)
    elif name.startswith("skew_"):
        formula = getattr(formulas, name)(options.alpha)
    else:
        formula = getattr(formulas, name)
    renormalised = getattr(options, "tail", "kept") == "renormalised"
    return FormulaDivergence(name, formula, temperature, options.token_clip, renormalised=renormalised)


def ce_per_token(logits: mx.array, labels: mx.array) -> mx.array:
    """Cross-entropy in nats of labels `(N,)` under logits `(N, V)` at temperature 1: `(N,)`."""
    return -student_outcomes(logits, labels[:, None])[:, 0]


def ce(logits: mx.array, labels: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy over the positions where mask `(N,)` is 1, and the number of those positions."""
    return (ce_per_token(logits, labels) * mask).sum(), mask.sum()
