"""Student against teacher on held-out prompts, over the full vocabulary.

The teacher completes every prompt greedily. At each of its tokens the two full distributions are compared, the
teacher's rebuilt from its hidden states and its head, in chunks of rows and in float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.config import RunConfig
from opd_daemon.distill.batches import packed, pad
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.exact import compare
from opd_daemon.distill.objective import watch
from opd_daemon.distill.planning import CHUNK_BYTES
from opd_daemon.distill.rollouts import Rollout, sample_completions, teacher_completions
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix, as_mlx
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher
from opd_daemon.types import EvaluationMetrics, ScoreRequest, ScoreWants

SHOWN_ANSWERS = 3

Values = dict[str, npt.NDArray[np.float32]]


class Evaluator:
    """Measures a student against its teacher on the same completions every time.

    The completions are generated once. `exact` turns false when the teacher's head can't be split off; then the
    comparison is over the teacher's top k and the tail.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        prompts: Sequence[Prompt],
        config: RunConfig,
        masked_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.prompts = prompts
        self.config = config.model_copy(update={"temperature": 1.0, "support": "teacher"})
        self.masked_token_ids = masked_token_ids
        self.exact = teacher.info.supports_hidden
        self._rollouts: list[Rollout] | None = None
        self._head: HeadMatrix | None = None

    @property
    def rollouts(self) -> list[Rollout]:
        """The teacher's greedy completions of the held-out prompts."""
        if self._rollouts is None:
            length = self.config.max_generation_tokens
            self._rollouts = teacher_completions(self.teacher, self.prompts, max_tokens=length, temperature=0.0, seed=0)
        return self._rollouts

    def student_answers(self) -> list[Rollout]:
        """What the student now answers, greedily, to the first few held-out prompts."""
        length = self.config.max_generation_tokens
        shown = self.prompts[:SHOWN_ANSWERS]
        return sample_completions(self.student, shown, max_tokens=length, temperature=0.0, seed=0)

    def measure(self, step: int) -> EvaluationMetrics:
        """Compare the two models now."""
        started = time.perf_counter()
        values = self._exact_values() if self.exact else self._sparse_values()
        means: dict[str, Any] = {name: float(value.astype(np.float64).mean()) for name, value in values.items()}
        return EvaluationMetrics(
            step=step,
            exact=self.exact,
            tokens=len(next(iter(values.values()))),
            samples=len(self.rollouts),
            seconds=time.perf_counter() - started,
            **means,
        )

    def _exact_values(self) -> Values:
        try:
            head = self._teacher_head()
        except OpdError as refusal:
            if refusal.reason != Reason.HIDDEN_NOT_SUPPORTED:
                raise
            self.exact = False
            return self._sparse_values()
        wants = ScoreWants(token_stats=False, hidden=True)
        parts: list[Values] = []
        for start in range(0, len(self.rollouts), self.config.batch_size):
            rollouts = self.rollouts[start : start + self.config.batch_size]
            requests = [
                ScoreRequest(rollout.token_ids, rollout.score_from, wants, None, self.masked_token_ids)
                for rollout in rollouts
            ]
            scores = [answer.scores for answer in self.teacher.score(requests)]
            hidden = [as_mlx(entry.hidden, entry.hidden_dtype) for entry in scores if entry.hidden is not None]
            parts += self._compared(rollouts, mx.concatenate(hidden), head)
        return _joined(parts)

    def _compared(self, rollouts: Sequence[Rollout], teacher_states: mx.array, head: HeadMatrix) -> Iterator[Values]:
        student_states = self.student.states_at(*pad(rollouts))
        mx.eval(student_states)
        size = max(16, CHUNK_BYTES // (self.student.width * 4))
        for start in range(0, len(student_states), size):
            rows = slice(start, start + size)
            yield compare(head(teacher_states[rows]), self.student.head(student_states[rows]))

    def _sparse_values(self) -> Values:
        parts: list[Values] = []
        for start in range(0, len(self.rollouts), self.config.batch_size):
            rollouts = self.rollouts[start : start + self.config.batch_size]
            targets = ask(self.teacher, rollouts, self.config, self.masked_token_ids)
            for batch in packed(rollouts, targets, size=len(rollouts), temperature=1.0, labels="teacher"):
                logits = self.student.head(self.student.states_at(batch.tokens, batch.places))
                values = {name: np.array(value) for name, value in watch(logits, batch.rows).items()}
                values["teacher_entropy"] = np.concatenate([target.entropies for target in batch.targets])
                parts.append(values)
        return _joined(parts)

    def _teacher_head(self) -> HeadMatrix:
        if self._head is None:
            self._head = HeadMatrix(self.teacher.head(), self.student.vocabulary)
        return self._head


def _joined(parts: Sequence[Values]) -> Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
