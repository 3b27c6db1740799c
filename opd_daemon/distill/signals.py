"""What a teacher says about N positions, in three kinds, all at the temperature of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from opd_daemon.distill.logits import IMPOSSIBLE, log1mexp


@dataclass(frozen=True, slots=True, eq=False)
class ExactSignal:
    """The teacher's whole distribution: logits (N, V), ids that don't exist masked as in the student's.

    The temperature is applied by the divergence.
    """

    logits: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class SparseSignal:
    """A teacher's distribution at N positions, at one temperature, on some ids and their tail.

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


@dataclass(frozen=True, slots=True, eq=False)
class SampledSignal:
    """One token at each of N positions, sampled by the student, and what the teacher thinks of it.

    tokens (N,) int32; teacher_logprobs (N,). behaviour_logprobs (N,): of the student that sampled, where it is not the
    one that is trained. support: the teacher's distribution in full or on ids that don't depend on the tokens, from
    which a baseline can be computed.
    """

    tokens: mx.array
    teacher_logprobs: mx.array
    behaviour_logprobs: mx.array | None = None
    support: ExactSignal | SparseSignal | None = None

    def rows(self, start: int, stop: int) -> SampledSignal:
        """The positions start … stop−1."""
        cut, support = slice(start, stop), self.support
        if isinstance(support, ExactSignal):
            support = ExactSignal(support.logits[cut])
        elif support is not None:
            support = support.rows(start, stop)
        behaviour = None if self.behaviour_logprobs is None else self.behaviour_logprobs[cut]
        return SampledSignal(self.tokens[cut], self.teacher_logprobs[cut], behaviour, support)


Signal = ExactSignal | SparseSignal | SampledSignal


def at_temperature(plain: SparseSignal, log_z: mx.array, temperature: float) -> SparseSignal:
    """The signal at a temperature, from that at temperature 1 and log_z `(N,)` = log Σ_v exp(logprob_v / T).

    The tail is what the ids leave of 1, as its mass at T can't be had from its mass at 1; nothing stays nothing.
    """
    tempered = plain.logprobs / temperature - log_z[:, None]
    rest = log1mexp(mx.logsumexp(tempered, axis=-1))
    return SparseSignal(plain.ids, tempered, mx.where(plain.tail > IMPOSSIBLE, rest, plain.tail))
