"""Teacher and student compared at every token of completions, over the full vocabulary where the teacher allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.config import RunConfig
from opd_daemon.distill.batches import pack, pad
from opd_daemon.distill.exact import compare
from opd_daemon.distill.logits import logsumexp
from opd_daemon.distill.objective import watch
from opd_daemon.distill.outcomes import student_outcomes
from opd_daemon.distill.planning import CHUNK_BYTES
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.signals import SparseSignal
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix, as_mlx
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher
from opd_daemon.types import CachedScores, ScoreRequest, ScoreWants

Columns = dict[str, npt.NDArray[Any]]
"""Values by name of one completion's R tokens, each `(R,)`."""

# Teacher states of completions that stay the same are kept, up to so many bytes: asking again costs a reading of the
# teacher's cache (some milliseconds a completion), or without the cache a prefill.
KEPT_BYTES = 64 << 20


class Tokenwise:
    """Compares the two models as they are now, at temperature 1, in chunks of rows and in float32.

    `exact` turns false when the teacher's head can't be split off; then the comparison is over the teacher's top k
    and the tail: the divergences are lower bounds, the acceptance is an upper one.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        config: RunConfig,
        masked_token_ids: tuple[int, ...] = (),
        head: Callable[[], HeadMatrix] | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.batch_size = config.batch_size
        self.exact = teacher.info.supports_hidden
        self._sparse_config = sparse_config(config)
        self._masked_token_ids = masked_token_ids
        self._head = head or cache(lambda: HeadMatrix(teacher.head(), student.vocabulary))
        self._kept: dict[Rollout, mx.array] = {}

    def compare(self, rollouts: Sequence[Rollout], *, keep: bool = False) -> list[Columns]:
        """The columns of `exact.NAMES` for every completion, in order. keep: the same completions will come again."""
        return self._compare(rollouts, keep=keep, views=False)

    def view(self, rollouts: Sequence[Rollout], *, keep: bool = False) -> list[Columns]:
        """Besides, what each model says about the tokens.

        teacher_logprob, student_logprob: of the token that is there, nats; teacher_top, student_top: the id each model
        finds most likely.
        """
        return self._compare(rollouts, keep=keep, views=True)

    def _compare(self, rollouts: Sequence[Rollout], *, keep: bool, views: bool) -> list[Columns]:
        head = self._teacher_head()
        order = sorted(range(len(rollouts)), key=lambda place: len(rollouts[place].token_ids))
        found: dict[int, Columns] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = [rollouts[place] for place in places]
            parts = self._sparse(batch, views=views) if head is None else self._exact(batch, head, keep, views=views)
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            ends = np.cumsum([len(rollout.completion_ids) for rollout in batch])
            for place, start_row, end_row in zip(places, [0, *ends[:-1]], ends, strict=True):
                found[place] = {name: values[start_row:end_row] for name, values in columns.items()}
        return [found[place] for place in range(len(rollouts))]

    def _exact(self, batch: Sequence[Rollout], head: HeadMatrix, keep: bool, *, views: bool) -> list[Columns]:
        teacher_states = mx.concatenate(self._teacher_states(batch, keep))
        student_states = self.student.states_at(*pad(batch))
        mx.eval(teacher_states, student_states)
        labels = _labels(batch)
        parts = []
        size = max(16, CHUNK_BYTES // (self.student.width * 4))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            teacher, student = head(teacher_states[rows]), self.student.head(student_states[rows])
            part: Columns = {**compare(teacher, student)}
            if views:
                part["teacher_logprob"], part["teacher_top"] = _said(teacher, labels[rows])
                part["student_logprob"], part["student_top"] = _said(student, labels[rows])
            parts.append(part)
        return parts

    def _teacher_states(self, batch: Sequence[Rollout], keep: bool) -> list[mx.array]:
        missing = [rollout for rollout in batch if rollout not in self._kept]
        answers = ask_states(self.teacher, missing, self._masked_token_ids)
        new = {}
        for rollout, answer in zip(missing, answers, strict=True):
            if answer.scores.hidden is None:
                raise OpdError(Reason.INTERNAL, "the teacher left out the hidden states it was asked for")
            new[rollout] = as_mlx(answer.scores.hidden, answer.scores.hidden_dtype)
        if keep and sum(states.nbytes for states in (*self._kept.values(), *new.values())) <= KEPT_BYTES:
            self._kept |= new
        return [self._kept[rollout] if rollout in self._kept else new[rollout] for rollout in batch]

    def _sparse(self, batch: Sequence[Rollout], *, views: bool) -> list[Columns]:
        targets = ask(self.teacher, batch, self._sparse_config, self._masked_token_ids)
        packed = pack(batch, targets, 1.0, "completion")
        logits = self.student.head(self.student.states_at(packed.tokens, packed.places))
        columns: Columns = {name: np.array(value) for name, value in watch(logits, packed.rows).items()}
        signal = packed.rows.plain_signal
        shared = mx.minimum(signal.outcomes(), student_outcomes(logits, signal.ids))
        columns["acceptance"] = np.array(mx.exp(shared).sum(axis=-1))
        if views:
            columns["student_logprob"], columns["student_top"] = _said(logits, _labels(batch))
            columns["teacher_logprob"] = _logprobs_of(signal, packed.rows.labels)
            columns["teacher_top"] = np.array(packed.rows.teacher_top)
        return [columns]

    def _teacher_head(self) -> HeadMatrix | None:
        if not self.exact:
            return None
        try:
            return self._head()
        except OpdError as refusal:
            if refusal.reason != Reason.HIDDEN_NOT_SUPPORTED:
                raise
            self.exact = False
            return None


def ask_states(
    teacher: Teacher, rollouts: Sequence[Rollout], masked_token_ids: tuple[int, ...] = ()
) -> list[CachedScores]:
    """The teacher's hidden states at every completion token, one answer per rollout."""
    wants = ScoreWants(token_stats=False, hidden=True)
    requests = [
        ScoreRequest(rollout.teacher_token_ids, rollout.teacher_score_from, wants, None, masked_token_ids)
        for rollout in rollouts
    ]
    return teacher.score(requests) if requests else []


def sparse_config(config: RunConfig) -> RunConfig:
    """What is asked of a teacher that gives no hidden states: its own top k, at temperature 1."""
    return config.model_copy(
        update={"signal": "sparse", "support": "teacher", "temperature": 1.0, "top_mass": 0.0, "exact_fraction": 0.0}
    )


def _labels(batch: Sequence[Rollout]) -> mx.array:
    return mx.array(np.concatenate([np.array(rollout.completion_ids, dtype=np.int32) for rollout in batch]))


def _said(logits: mx.array, labels: mx.array) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Logprobs of the labels, and the most likely ids: `(N, V)` → `(N,)`, `(N,)`."""
    logprobs = mx.take_along_axis(logits, labels[:, None], axis=-1) - logsumexp(logits)
    return np.array(logprobs[:, 0]), np.array(mx.argmax(logits, axis=-1))


def _logprobs_of(signal: SparseSignal, labels: mx.array) -> npt.NDArray[Any]:
    """The teacher's logprob of every label; of one outside its top k, that of all such tokens together."""
    named = np.array(signal.ids) == np.array(labels)[:, None]
    known = np.take_along_axis(np.array(signal.logprobs), named.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return np.where(named.any(axis=-1), known, np.array(signal.tail))
