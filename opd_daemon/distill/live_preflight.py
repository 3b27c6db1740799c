"""What no file shows: whether the two models, once loaded, say anything sound, each token's row in its own place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Int32
from opd_daemon.distill.batches import pad
from opd_daemon.distill.logits import entropy, logsumexp
from opd_daemon.distill.rollouts import Rollout, sample_completions
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher
from opd_daemon.types import ScoreRequest, ScoreWants

COMPLETIONS = 4
STUDENT_TOKENS = 12
# Too few tokens prove nothing.
FEWEST_TOKENS = 8
# A greedy token is the likeliest of its own row; of the rows beside it, it is only by chance.
MARGIN_NATS = 0.1
# Entropy this close to that of a distribution that knows nothing.
UNIFORM_NATS = 0.02

Table = npt.NDArray[np.float64]


def check_models(teacher: Teacher, student: Student, written: Sequence[Rollout], masked: tuple[int, ...] = ()) -> None:
    """Check both models on completions the teacher has written greedily.

    Each must give finite numbers, must not find every token equally likely, and must find its own greedy tokens
    likelier in their own rows than in the rows before and after: rows that are off by one are the commonest fault of
    a distillation, and training on them looks like learning.

    Raises:
        OpdError: NOT_A_NUMBER or MODELS_UNSOUND, saying which model and what was found.
    """
    chosen = checkable(written)
    if not chosen:
        return
    check_teacher(teacher, chosen, masked)
    prompts = [rollout.prompt for rollout in chosen]
    own = sample_completions(student, prompts, max_tokens=STUDENT_TOKENS, temperature=0.0, seed=0)
    check_student(student, [rollout for rollout in own if len(rollout.completion_ids) > 1])


def checkable(written: Sequence[Rollout]) -> list[Rollout]:
    """The completions that are checked: of one token, nothing can be out of place."""
    return [rollout for rollout in written if len(rollout.completion_ids) > 1][:COMPLETIONS]


def check_teacher(teacher: Teacher, rollouts: Sequence[Rollout], masked: tuple[int, ...]) -> None:
    """Score the teacher's own greedy tokens, and those beside them, in every row."""
    wants = ScoreWants(token_stats=True)
    requests = [
        ScoreRequest(
            rollout.teacher_token_ids, rollout.teacher_score_from, wants, _neighbours(rollout.completion_ids), masked
        )
        for rollout in rollouts
    ]
    scores = [answer.scores for answer in teacher.score(requests)]
    table = np.concatenate([np.asarray(entry.candidate_logprobs, np.float64) for entry in scores])
    entropies = np.concatenate([np.asarray(entry.entropies, np.float64) for entry in scores])
    size = teacher.info.vocab_size - len(masked)
    _check(f"teacher {teacher.info.name}", table, entropies, size, _tokens(rollouts))


def check_student(student: Student, rollouts: Sequence[Rollout]) -> None:
    """Compute the student's own greedy tokens again, in one forward as training does."""
    if not rollouts:
        return
    logits = student.head(student.states_at(*pad(rollouts)))
    ids = np.concatenate([_neighbours(rollout.completion_ids) for rollout in rollouts])
    picked = mx.take_along_axis(logits, mx.array(np.maximum(ids, 0)), axis=-1) - logsumexp(logits)
    size = student.vocabulary.width - len(student.vocabulary.hidden_ids)
    table = np.array(picked, dtype=np.float64)
    table[ids < 0] = -np.inf
    _check("the student", table, np.array(entropy(logits), dtype=np.float64), size, _tokens(rollouts))


def _neighbours(ids: Sequence[int]) -> Int32:
    """For every token of a completion, that before it, itself, and that after it `(R, 3)`; −1 where there is none."""
    padded = np.array([-1, *ids, -1], dtype=np.int32)
    return np.stack([padded[:-2], padded[1:-1], padded[2:]], axis=-1)


def _tokens(rollouts: Sequence[Rollout]) -> Int32:
    return np.concatenate([_neighbours(rollout.completion_ids) for rollout in rollouts])


def _check(who: str, table: Table, entropies: Table, size: int, ids: Int32) -> None:
    """Raise for an unsound table (R, 3) of neighbouring tokens' logprobs. size: of the vocabulary both models know."""
    own = table[:, 1]
    if not (np.isfinite(own).all() and np.isfinite(entropies).all()):
        cure = "its weights are damaged, or overflow their type: download it again, or set mixed_precision false"
        raise OpdError(Reason.NOT_A_NUMBER, f"{who} gives numbers that are none; {cure}", model=who)
    if math.log(size) - entropies.mean() < UNIFORM_NATS:
        message = (
            f"{who} finds all {size} tokens equally likely (mean logprob {own.mean():.2f}, ln {size} is "
            f"{math.log(size):.2f}): its weights were not loaded, or are those of an untrained model"
        )
        raise OpdError(Reason.MODELS_UNSOUND, message, model=who)
    for column, place in ((0, "before"), (2, "after")):
        differ = (ids[:, column] >= 0) & (ids[:, column] != ids[:, 1])
        if differ.sum() < FEWEST_TOKENS:
            continue
        shifted = np.maximum(table[differ, column], math.log(1e-9)).mean()
        aligned = own[differ].mean()
        if aligned < shifted + MARGIN_NATS:
            message = (
                f"{who} finds its own tokens no likelier ({aligned:.2f} nats) than those one place {place} them "
                f"({shifted:.2f}): its rows are out of place by one; please report this with the model's type"
            )
            raise OpdError(Reason.MODELS_UNSOUND, message, model=who)
