"""Micro-batches: completions with their teacher targets as padded arrays.

Masks come from positions, never from token values: the rows trained on are those in front of completion tokens, EOS
included; prompt, padding and tokens a rollout leaves untrained have no rows at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Int32
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import TeacherTargets, trained_length
from opd_daemon.distill.signals import SampledSignal, SparseSignal, at_temperature
from opd_daemon.distill.teacher_head import as_mlx
from opd_daemon.types import HiddenDtype

if TYPE_CHECKING:
    from opd_daemon.config import LossMean
    from opd_daemon.trainer import TrainContext

LENGTH_MULTIPLE = 16
BUCKETS_PER_OCTAVE = 8

Labels = Literal["teacher", "completion"]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """Hidden states of the teacher at some of N positions, as they came: they become arrays of MLX a chunk at a time.

    states (M, D); bfloat16 as uint16 bit patterns. places (N,): row of `states` for each position, −1 for none.
    """

    states: npt.NDArray[Any]
    dtype: HiddenDtype
    places: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> HiddenRows:
        """The positions start … stop−1."""
        return HiddenRows(self.states, self.dtype, self.places[start:stop])

    @property
    def known(self) -> npt.NDArray[np.int64]:
        """The positions that have a state."""
        return np.flatnonzero(self.places >= 0)

    def array(self) -> mx.array:
        """The states of those positions, in order: `(len(known), D)`."""
        return as_mlx(self.states[self.places[self.known]], self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N completion positions.

    labels (N,): targets of the cross-entropy; −1 stands for the teacher's likeliest token, still to be found out.
    mask (N,): what a position weighs in the loss, 1 or one over its sequence's tokens; 0 leaves it out.
    signal: the teacher at the loss temperature, None where it is exact or there is none. plain: on the same ids at
    temperature 1. hidden: states of the teacher, for signal exact and for the positions where the bias is measured.
    teacher_top (N,): its likeliest token; teacher_entropy (N,): in nats; None where they follow from the states.
    """

    labels: mx.array
    mask: mx.array
    signal: SparseSignal | SampledSignal | None = None
    plain: SparseSignal | None = None
    teacher_top: mx.array | None = None
    teacher_entropy: mx.array | None = None
    hidden: HiddenRows | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def exact(self) -> bool:
        """Whether the teacher's whole distribution is the signal."""
        return self.signal is None and self.hidden is not None

    @property
    def plain_signal(self) -> SparseSignal:
        """The teacher on some ids at temperature 1, where it was asked about some."""
        if self.plain is None:
            raise ValueError("these rows hold no sparse signal")
        return self.plain

    def part(self, start: int, stop: int, fresh: int | None = None) -> Rows:
        """The positions start … stop−1. Those before `fresh` weigh nothing, and no bias is measured there."""
        cut = slice(start, stop)
        plain = None if self.plain is None else self.plain.rows(start, stop)
        signal = self.signal
        if signal is not None:
            signal = plain if signal is self.plain else signal.rows(start, stop)
        mask, hidden = self.mask[cut], None if self.hidden is None else self.hidden.part(start, stop)
        if fresh is not None and fresh > start:
            stale = np.arange(start, stop) < fresh
            mask = mx.where(mx.array(stale), 0.0, mask)
            if hidden is not None and not self.exact:
                hidden = replace(hidden, places=np.where(stale, -1, hidden.places))
        return Rows(
            self.labels[cut],
            mask,
            signal,
            plain,
            None if self.teacher_top is None else self.teacher_top[cut],
            None if self.teacher_entropy is None else self.teacher_entropy[cut],
            hidden,
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """B sequences padded on the right to T tokens, which causal attention never looks at.

    tokens (B, T) int32. places (N,): index into the B·T positions of the state that predicts each row's token.
    count: what the loss's sum over the rows is a sum of, tokens or sequences.
    """

    rollouts: tuple[Rollout, ...]
    targets: tuple[TeacherTargets, ...]
    tokens: mx.array
    places: mx.array
    rows: Rows
    count: float


def micro_batches(
    context: TrainContext, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets] | None, *, labels: Labels
) -> Iterator[MicroBatch]:
    """Pack rollouts and their targets into micro-batches of the run's size, sequences of like length together.

    targets: None where no teacher is needed. labels: what the cross-entropy aims at, the teacher's most likely token or
    the completion's own.
    """
    config = context.config
    return packed(
        rollouts,
        [TeacherTargets()] * len(rollouts) if targets is None else targets,
        size=context.micro_batch_size,
        temperature=config.temperature,
        labels=labels,
        max_tokens=config.max_batch_tokens >> context.memory_halvings,
        loss_mean=config.loss_mean,
        sampled=config.signal == "sampled",
    )


def packed(
    rollouts: Sequence[Rollout],
    targets: Sequence[TeacherTargets],
    *,
    size: int,
    temperature: float,
    labels: Labels,
    max_tokens: int = 0,
    loss_mean: LossMean = "token",
    sampled: bool = False,
) -> Iterator[MicroBatch]:
    """Pack rollouts and their targets, at most `size` sequences a batch, sequences of like length together.

    max_tokens: most tokens of a batch, padding included, but at least one sequence; 0 for no such limit. Rollouts
    without a trained token are left out.
    """
    lengths = {place: _input_length(rollout) for place, rollout in enumerate(rollouts) if trained_length(rollout)}
    for chosen in _groups(lengths, size, max_tokens):
        one = [rollouts[place] for place in chosen], [targets[place] for place in chosen]
        yield pack(*one, temperature, labels, loss_mean=loss_mean, sampled=sampled)


def _groups(lengths: Mapping[int, int], size: int, max_tokens: int) -> Iterator[list[int]]:
    """Places of the sequences of each batch, from the shortest to the longest."""
    group: list[int] = []
    for place in sorted(lengths, key=lengths.__getitem__):
        if group and (len(group) == size or 0 < max_tokens < (len(group) + 1) * _width(lengths[place])):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def pack(
    rollouts: Sequence[Rollout],
    targets: Sequence[TeacherTargets],
    temperature: float,
    labels: Labels,
    *,
    loss_mean: LossMean = "token",
    sampled: bool = False,
) -> MicroBatch:
    """One micro-batch of these rollouts.

    loss_mean: every token weighs the same, or every sequence. sampled: the targets are about the tokens themselves.
    """
    trained = [_trained(rollout) for rollout in rollouts]
    count = float(sum(map(len, trained)) if loss_mean == "token" else len(rollouts))
    for rollout, target in zip(rollouts, targets, strict=True):
        _check_rows(rollout, target)
    parts = [target.at(places) for target, places in zip(targets, trained, strict=True)]
    own = np.concatenate([_own(rollout)[places] for rollout, places in zip(rollouts, trained, strict=True)])
    weights = [np.full(len(places), 1.0 if loss_mean == "token" else 1.0 / len(places)) for places in trained]
    hidden, plain, top, entropies = _hidden(parts, trained), _plain(parts), *_joined(parts, "top_ids", "entropies")
    signal: SparseSignal | SampledSignal | None = plain
    if plain is not None and temperature != 1:
        signal = at_temperature(plain, _log_z(parts), temperature)
    if sampled:
        signal = _sampled(parts, own, _behaviour(rollouts, trained), signal, temperature)
    rows = Rows(
        mx.array(own) if labels == "completion" else _likeliest(top, hidden, len(own)),
        mx.array(np.concatenate(weights).astype(np.float32)),
        signal,
        plain,
        top,
        entropies,
        hidden,
    )
    return MicroBatch(tuple(rollouts), tuple(targets), *_padded(rollouts, trained), rows, count)


def pad(rollouts: Sequence[Rollout]) -> tuple[mx.array, mx.array]:
    """Tokens `(B, T)` padded on the right, and places `(N,)` of the states that predict the completions' tokens."""
    return _padded(rollouts, [np.arange(len(rollout.completion_ids)) for rollout in rollouts])


def _padded(rollouts: Sequence[Rollout], chosen: Sequence[npt.NDArray[np.int64]]) -> tuple[mx.array, mx.array]:
    """As `pad`, for some tokens of each completion; what comes behind the last of them is left out."""
    lengths = [rollout.score_from + int(places[-1]) for rollout, places in zip(rollouts, chosen, strict=True)]
    width = _width(max(lengths))
    tokens = np.zeros((len(rollouts), width), dtype=np.int32)
    for line, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
        tokens[line, :length] = rollout.token_ids[:length]
    states = [line * width + rollouts[line].score_from - 1 + places for line, places in enumerate(chosen)]
    return mx.array(tokens), mx.array(np.concatenate(states).astype(np.int32))


def _trained(rollout: Rollout) -> npt.NDArray[np.int64]:
    """Places in the completion of the tokens that are trained on."""
    trained = rollout.trained
    return np.arange(len(rollout.completion_ids)) if trained is None else np.flatnonzero(trained)


def _input_length(rollout: Rollout) -> int:
    """Tokens the student has to read to predict the last trained one."""
    return rollout.score_from + trained_length(rollout) - 1


def _width(length: int) -> int:
    """The next length of which there are only some in every octave, so that batches come in few shapes."""
    multiple = max(LENGTH_MULTIPLE, (1 << length.bit_length() - 1) // BUCKETS_PER_OCTAVE)
    return -(-length // multiple) * multiple


def _check_rows(rollout: Rollout, target: TeacherTargets) -> None:
    about = next((values for values in (target.hidden, target.ids) if values is not None), None)
    if about is not None and len(about) not in {trained_length(rollout), len(rollout.completion_ids)}:
        raise ValueError(f"{len(about)} teacher rows for {len(rollout.completion_ids)} completion tokens")


def _own(rollout: Rollout) -> Int32:
    return np.array(rollout.completion_ids, np.int32)


def _joined(parts: Sequence[TeacherTargets], *names: str) -> list[mx.array | None]:
    """Arrays of all parts put together; None where they have none."""
    columns = [[getattr(part, name) for part in parts] for name in names]
    return [None if column[0] is None else mx.array(np.concatenate(column)) for column in columns]


def _known(parts: Sequence[TeacherTargets], name: str) -> mx.array:
    (joined,) = _joined(parts, name)
    if joined is None:
        raise ValueError(f"the signal needs the teacher's {name}")
    return joined


def _likeliest(top: mx.array | None, hidden: HiddenRows | None, count: int) -> mx.array:
    if top is None and hidden is None:
        raise ValueError("without a teacher the cross-entropy can't aim at its tokens; use labels='completion'")
    return mx.full((count,), -1, dtype=mx.int32) if top is None else top


def _plain(parts: Sequence[TeacherTargets]) -> SparseSignal | None:
    (tail,) = _joined(parts, "tail")
    if tail is None:
        return None
    width = max(part.ids.shape[1] for part in parts if part.ids is not None)
    ids = np.concatenate([_widened(part.ids, width, -1) for part in parts])
    logprobs = np.concatenate([_widened(part.logprobs, width, -np.inf) for part in parts])
    return SparseSignal(mx.array(ids), mx.array(logprobs), tail)


def _sampled(
    parts: Sequence[TeacherTargets], own: Int32, behaviour: mx.array | None, support: Any, temperature: float
) -> SampledSignal:
    logprobs = _known(parts, "token_logprobs")
    if temperature != 1:
        logprobs = logprobs / temperature - _log_z(parts)
    return SampledSignal(mx.array(own), logprobs, behaviour, support)


def _behaviour(rollouts: Sequence[Rollout], trained: Sequence[npt.NDArray[np.int64]]) -> mx.array | None:
    pairs = zip([rollout.behaviour_logprobs for rollout in rollouts], trained, strict=True)
    known = [logprobs[places] for logprobs, places in pairs if logprobs is not None]
    return mx.array(np.concatenate(known)) if len(known) == len(rollouts) else None


def _log_z(parts: Sequence[TeacherTargets]) -> mx.array:
    return _known(parts, "log_z")


def _hidden(parts: Sequence[TeacherTargets], trained: Sequence[npt.NDArray[np.int64]]) -> HiddenRows | None:
    known = [part for part in parts if part.hidden is not None]
    if not known:
        return None
    owned = np.repeat([part.hidden is not None for part in parts], [len(places) for places in trained])
    places = np.where(owned, np.cumsum(owned) - 1, -1)
    states = np.concatenate([part.hidden for part in known if part.hidden is not None])
    return HiddenRows(states, known[0].hidden_dtype, places)


def _widened(values: npt.NDArray[Any] | None, width: int, filler: float) -> npt.NDArray[Any]:
    if values is None:
        raise ValueError("some targets hold ids and some don't")
    lacking = width - values.shape[1]
    return np.pad(values, ((0, 0), (0, lacking)), constant_values=filler) if lacking else values
