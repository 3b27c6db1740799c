"""How near the student is to its teacher, on held-out prompts that are never trained on.

Two sets of completions are compared token by token over the full vocabulary: the teacher's greedy ones, the same at
every evaluation, and those the student samples now. The best checkpoint is chosen by the trained divergence on the
set that is like what the trainer trains on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.config import RunConfig
from opd_daemon.distill.confidence import summarise
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.rollouts import Rollout, sample_completions, teacher_completions
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.step import step_seed
from opd_daemon.distill.student import Student
from opd_daemon.distill.tasks import task_accuracies, task_names
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.distill.token_table import CompletionTable, PositionCurve, TokenTable, token_texts
from opd_daemon.distill.tokenwise import Columns, Tokenwise, ask_states, sparse_config
from opd_daemon.trainer import Teacher, TrainerInfo
from opd_daemon.types import Comparison, EvaluationMetrics

SHOWN_ANSWERS = 4
POSITION_BINS = 64

# By what the best checkpoint of a divergence is chosen: itself where it is measured, else the one most like it.
MEASURED = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "skew_forward_kl": "forward_kl",
    "skew_reverse_kl": "reverse_kl",
    "total_variation": "acceptance",
}


class Evaluator:
    """Measures a student against its teacher, always on the same prompts.

    trainer: the one that trains, which decides by what the best checkpoint is chosen. head: gives the teacher's head,
    where someone else holds it already. on_policy: whether the student's own samples decide.
    table: the teacher's first completions token by token, as of the last `measure`. tokenwise: what compares.
    once_seconds: how much of the last `measure`'s time was the teacher's for completions that stay the same.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        prompts: Sequence[Prompt],
        config: RunConfig,
        *,
        masked_token_ids: tuple[int, ...] = (),
        trainer: TrainerInfo | None = None,
        head: Callable[[], HeadMatrix] | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.prompts = prompts
        self.config = config
        self.on_policy = trainer is not None and trainer.on_policy
        self.table: TokenTable | None = None
        self.once_seconds = 0.0
        self._criterion = criterion(config, trainer)
        self.tokenwise = Tokenwise(teacher, student, config, masked_token_ids, head)
        self._masked_token_ids = masked_token_ids
        self._rollouts: list[Rollout] | None = None
        self._written_seconds = 0.0

    @property
    def exact(self) -> bool:
        """Whether the comparison is over the full vocabulary."""
        return self.tokenwise.exact

    @property
    def rollouts(self) -> list[Rollout]:
        """The teacher's greedy completions of the held-out prompts, generated once."""
        if self._rollouts is None:
            started = time.perf_counter()
            self._rollouts = greedy_completions(self.teacher, self.prompts, self.config, self._masked_token_ids)
            self._written_seconds = time.perf_counter() - started
        return self._rollouts

    def student_answers(self) -> list[Rollout]:
        """What the student now answers, greedily, to the first few held-out prompts."""
        length = self.config.max_generation_tokens
        shown = self.prompts[:SHOWN_ANSWERS]
        return sample_completions(self.student, shown, max_tokens=length, temperature=0.0, seed=0)

    def teacher_answers(self) -> list[Rollout]:
        """What the teacher answers to them."""
        return self.rollouts[:SHOWN_ANSWERS]

    def student_samples(self) -> list[Rollout]:
        """Completions the student samples now, at the run's `generation_temperature` as in training.

        The random numbers are those of the run's seed and the prompt's place, not of the step: two evaluations differ
        by the student alone, which makes them pairs. No step of the training uses the same ones.
        """
        return sample_completions(
            self.student,
            self.prompts[: self.config.max_eval_samples],
            max_tokens=self.config.max_generation_tokens,
            temperature=self.config.generation_temperature,
            seed=step_seed(self.config.seed, 0),
        )

    def measure(self, step: int) -> EvaluationMetrics:
        """Compare the two models now."""
        shown, rest = self.rollouts[:SHOWN_ANSWERS], self.rollouts[SHOWN_ANSWERS:]
        self.once_seconds, self._written_seconds = self._written_seconds, 0.0
        started = time.perf_counter()
        viewed = self.tokenwise.view(shown, keep=True)
        on_teacher_tokens = [*viewed, *self.tokenwise.compare(rest, keep=True)]
        on_teacher = summarise(on_teacher_tokens)
        on_student = None
        if self.config.max_eval_samples and not self.config.precompute:  # then nobody is there to score them
            on_student = summarise(self.tokenwise.compare(self.student_samples()))
        self.table = TokenTable(step, self._tables(shown, viewed), by_position(on_teacher_tokens))
        return EvaluationMetrics(
            step=step,
            forward_kl=on_teacher.forward_kl,
            reverse_kl=on_teacher.reverse_kl,
            js_divergence=on_teacher.js_divergence,
            agreement=on_teacher.agreement,
            top5_agreement=on_teacher.top5_agreement,
            teacher_entropy=on_teacher.teacher_entropy,
            student_entropy=on_teacher.student_entropy,
            exact=self.exact,
            tokens=on_teacher.tokens,
            samples=on_teacher.samples,
            seconds=time.perf_counter() - started + self.once_seconds,
            on_teacher=on_teacher,
            on_student=on_student,
            validation_kl=self._validation_kl(on_student if self.on_policy and on_student else on_teacher),
        )

    def tasks(self) -> dict[str, float]:
        """Score of the student on each of `eval_tasks`. Raises INVALID_RUN_CONFIG for one that can't be evaluated."""
        return task_accuracies(self.student, task_names(self.config.eval_tasks), seed=self.config.seed)

    def _validation_kl(self, comparison: Comparison) -> float:
        value: float = getattr(comparison, self._criterion)
        return 1.0 - value if self._criterion == "acceptance" else value  # total variation is what isn't shared

    def _tables(self, rollouts: Sequence[Rollout], columns: Sequence[Columns]) -> tuple[CompletionTable, ...]:
        decode = self.student.tokenizer.decode

        def texts(ids: npt.NDArray[Any]) -> tuple[str, ...]:
            return tuple(decode([int(token)]) for token in ids)

        return tuple(
            CompletionTable(
                prompt=rollout.prompt.text,
                tokens=token_texts(decode, rollout.completion_ids),
                teacher_top=texts(values["teacher_top"]),
                student_top=texts(values["student_top"]),
                **{
                    name: tuple(round(float(value), 5) for value in values[name])
                    for name in ("forward_kl", "reverse_kl", "teacher_logprob", "student_logprob")
                },
            )
            for rollout, values in zip(rollouts, columns, strict=True)
        )


def greedy_completions(
    teacher: Teacher, prompts: Sequence[Prompt], config: RunConfig, masked_token_ids: tuple[int, ...] = ()
) -> list[Rollout]:
    """The teacher's greedy completions of held-out prompts."""
    return teacher_completions(
        teacher,
        prompts,
        max_tokens=config.max_generation_tokens,
        temperature=0.0,
        seed=0,
        masked_token_ids=masked_token_ids,
    )


def ask_ahead(
    teacher: Teacher, prompts: Sequence[Prompt], config: RunConfig, masked_token_ids: tuple[int, ...] = ()
) -> bool:
    """Let the teacher answer all that evaluations are going to ask, so that they find it in the cache.

    True when every score came out of the cache already.
    """
    rollouts = greedy_completions(teacher, prompts, config, masked_token_ids)
    if teacher.info.supports_hidden:
        return all(answer.cached for answer in ask_states(teacher, rollouts, masked_token_ids))
    return all(target.cached for target in ask(teacher, rollouts, sparse_config(config), masked_token_ids))


def criterion(config: RunConfig, trainer: TrainerInfo | None = None) -> str:
    """The measured number by which the best checkpoint is chosen: the trained divergence, or the one most like it.

    Cross-entropy alone is the forward KL but for the entropy of its data.
    """
    if config.kl_weight == 0 or (trainer is not None and not trainer.uses_teacher):
        return "forward_kl"
    if config.divergence == "jsd":  # its ends are the two KLs
        beta = config.divergence_options.get("beta", 0.5)
        return {0: "forward_kl", 1: "reverse_kl"}.get(beta, "js_divergence")
    return MEASURED.get(config.divergence, "js_divergence")


def by_position(completions: Sequence[Columns]) -> PositionCurve:
    """Mean KLs by place in the completion, in at most `POSITION_BINS` bins of equal width."""
    longest = max(len(values["forward_kl"]) for values in completions)
    width = -(-longest // POSITION_BINS)
    bins = np.concatenate([np.arange(len(values["forward_kl"])) // width for values in completions])
    count = np.bincount(bins)

    def means(name: str) -> tuple[float, ...]:
        sums = np.bincount(bins, np.concatenate([values[name] for values in completions]))
        return tuple(round(float(value), 6) for value in sums / count)

    starts = tuple(int(start) for start in width * np.arange(len(count)))
    return PositionCurve(starts, means("forward_kl"), means("reverse_kl"), tuple(int(number) for number in count))
