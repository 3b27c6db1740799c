"""What the teacher says about completions: requests to it, and its answers as training targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_daemon.config import RunConfig
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher, TrainContext
from opd_daemon.types import CachedScores, Float32, Int32, ScoreRequest, ScoreWants


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTargets:
    """The teacher's distributions at the R completion positions of one rollout, on K ids each and their tail.

    ids (R, K); logprobs (R, K) and tail (R,) at temperature 1; log_z (R,) at the loss temperature, None where that
    is 1. top_ids (R,): the teacher's most likely token. entropies (R,) in nats. cached: no model computed them now.
    """

    ids: Int32
    logprobs: Float32
    tail: Float32
    log_z: Float32 | None
    top_ids: Int32
    entropies: Float32
    cached: bool


def score(context: TrainContext, rollouts: Sequence[Rollout]) -> list[TeacherTargets]:
    """Let the teacher score every completion token with what the run's objective needs, one target per rollout."""
    return ask(context.teacher, rollouts, context.config, context.masked_token_ids)


def ask(
    teacher: Teacher, rollouts: Sequence[Rollout], config: RunConfig, masked_token_ids: tuple[int, ...] = ()
) -> list[TeacherTargets]:
    """Let the teacher score every completion token, one target per rollout.

    The support is the ids a rollout recorded when the student sampled it, else the teacher's own `config.top_k`.
    """
    requests = [_request(rollout, config, masked_token_ids) for rollout in rollouts]
    answers = teacher.score(requests)
    return [_targets(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _request(rollout: Rollout, config: RunConfig, masked_token_ids: tuple[int, ...]) -> ScoreRequest:
    wants = ScoreWants(
        token_stats=True,
        top_k=config.top_k if rollout.support_ids is None else 1,
        log_z_temperatures=() if config.temperature == 1 else (config.temperature,),
    )
    return ScoreRequest(rollout.token_ids, rollout.score_from, wants, rollout.support_ids, masked_token_ids)


def _targets(request: ScoreRequest, answer: CachedScores) -> TeacherTargets:
    scores = answer.scores
    if request.candidate_ids is None:
        ids, logprobs, tail = scores.top_ids, scores.top_logprobs, scores.top_tail
    else:
        ids, logprobs, tail = request.candidate_ids, scores.candidate_logprobs, scores.candidate_tail
    if ids is None or logprobs is None or tail is None or scores.top_ids is None or scores.entropies is None:
        raise OpdError(Reason.INTERNAL, "the teacher left out a result it was asked for")
    log_z = None if scores.log_z is None or not request.wants.log_z_temperatures else scores.log_z[:, 0]
    return TeacherTargets(ids, logprobs, tail, log_z, scores.top_ids[:, 0], scores.entropies, answer.cached)
