"""Micro-batches: completions with their teacher targets as padded arrays.

Masks come from positions, never from token values: the rows trained on are those in front of completion tokens, EOS
included; prompt and padding have no rows at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.distill.divergences import SparseSignal, at_temperature
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import TeacherTargets

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainContext

LENGTH_MULTIPLE = 16

Labels = Literal["teacher", "completion"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N completion positions. labels (N,): targets of the cross-entropy. mask (N,): 1 where a position is trained on.

    signal: the teacher at the loss temperature; plain_signal: at temperature 1. teacher_top (N,): its likeliest token.
    """

    labels: mx.array
    mask: mx.array
    signal: SparseSignal
    plain_signal: SparseSignal
    teacher_top: mx.array

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def part(self, start: int, stop: int) -> Rows:
        """The positions start … stop−1."""
        plain = self.plain_signal.rows(start, stop)
        signal = plain if self.signal is self.plain_signal else self.signal.rows(start, stop)
        cut = slice(start, stop)
        return Rows(self.labels[cut], self.mask[cut], signal, plain, self.teacher_top[cut])


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """B sequences padded on the right to T tokens, which causal attention never looks at.

    tokens (B, T) int32. places (N,): index into the B·T positions of the state that predicts each row's token.
    """

    rollouts: tuple[Rollout, ...]
    targets: tuple[TeacherTargets, ...]
    tokens: mx.array
    places: mx.array
    rows: Rows


def micro_batches(
    context: TrainContext, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets], *, labels: Labels
) -> Iterator[MicroBatch]:
    """Pack rollouts and their targets into micro-batches of the run's size, sequences of like length together."""
    size, temperature = context.micro_batch_size, context.config.temperature
    return packed(rollouts, targets, size=size, temperature=temperature, labels=labels)


def packed(
    rollouts: Sequence[Rollout],
    targets: Sequence[TeacherTargets],
    *,
    size: int,
    temperature: float,
    labels: Labels,
) -> Iterator[MicroBatch]:
    """Pack rollouts and their targets, `size` sequences a batch, sequences of like length together.

    labels: what the cross-entropy aims at, the teacher's most likely token or the completion's own.
    """
    order = sorted(range(len(rollouts)), key=lambda place: len(rollouts[place].token_ids))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield pack([rollouts[place] for place in chosen], [targets[place] for place in chosen], temperature, labels)


def pack(
    rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets], temperature: float, labels: Labels
) -> MicroBatch:
    """One micro-batch of these rollouts. Targets hold one row per completion token."""
    rows = _rows(rollouts, targets, temperature, labels)
    return MicroBatch(tuple(rollouts), tuple(targets), *pad(rollouts), rows)


def pad(rollouts: Sequence[Rollout]) -> tuple[mx.array, mx.array]:
    """Tokens `(B, T)` padded on the right, and places `(N,)` of the states that predict the completions' tokens."""
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    width = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = np.zeros((len(rollouts), width), dtype=np.int32)
    places = []
    for line, rollout in enumerate(rollouts):
        ids = rollout.token_ids
        tokens[line, : len(ids)] = ids
        places.append(line * width + np.arange(rollout.score_from - 1, len(ids) - 1, dtype=np.int32))
    return mx.array(tokens), mx.array(np.concatenate(places))


def _rows(rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets], temperature: float, labels: Labels) -> Rows:
    top = np.concatenate([target.top_ids for target in targets])
    own = np.concatenate([np.array(rollout.completion_ids, dtype=np.int32) for rollout in rollouts])
    if len(own) != len(top):
        raise ValueError(f"{len(top)} teacher rows for {len(own)} completion tokens")
    width = max(target.ids.shape[1] for target in targets)
    ids = mx.array(np.concatenate([_widened(target.ids, width, -1) for target in targets]))
    logprobs = mx.array(np.concatenate([_widened(target.logprobs, width, -np.inf) for target in targets]))
    plain = SparseSignal(ids, logprobs, mx.array(np.concatenate([target.tail for target in targets])))
    signal = plain
    if temperature != 1:
        log_z = np.concatenate([target.log_z for target in targets if target.log_z is not None])
        signal = at_temperature(plain, mx.array(log_z), temperature)
    return Rows(mx.array(top if labels == "teacher" else own), mx.ones((len(own),)), signal, plain, mx.array(top))


def _widened(values: npt.NDArray[Any], width: int, filler: float) -> npt.NDArray[Any]:
    lacking = width - values.shape[1]
    return np.pad(values, ((0, 0), (0, lacking)), constant_values=filler) if lacking else values
