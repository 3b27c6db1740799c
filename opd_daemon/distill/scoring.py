"""What the teacher says about completions: requests to it, and its answers as training targets."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Float32, Int32
from opd_daemon.config import RunConfig
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher, TrainContext
from opd_daemon.types import CachedScores, HiddenDtype, ScoreRequest, Scores, ScoreWants


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTargets:
    """The teacher's distributions at the first R positions of one completion, up to the last one that is trained on.

    What the run's signal doesn't need is None.
    Sparse: ids (R, K), logprobs (R, K) and tail (R,) at temperature 1. Sampled: token_logprobs (R,) of the completion's
    own tokens at temperature 1; its ids: the teacher's top k for a baseline, or its favourite and the token to watch.
    Both: log_z (R,) at the loss temperature where that isn't 1; top_ids (R,): the teacher's most likely token;
    entropies (R,) in nats.
    Exact, and where the bias of another signal is measured: hidden (R, D) in hidden_dtype.
    cached: no model computed them now.
    """

    ids: Int32 | None = None
    logprobs: Float32 | None = None
    tail: Float32 | None = None
    log_z: Float32 | None = None
    top_ids: Int32 | None = None
    entropies: Float32 | None = None
    cached: bool = False
    token_logprobs: Float32 | None = None
    hidden: npt.NDArray[Any] | None = None
    hidden_dtype: HiddenDtype = "float32"

    @property
    def asked(self) -> bool:
        """Whether a teacher said anything."""
        return self.top_ids is not None or self.hidden is not None

    def at(self, places: npt.NDArray[np.int64]) -> TeacherTargets:
        """The same at some of the positions."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {name: value[places] for name, value in arrays.items() if isinstance(value, np.ndarray)}
        return replace(self, **kept)


def score(context: TrainContext, rollouts: Sequence[Rollout]) -> list[TeacherTargets]:
    """Let the teacher score every completion token with what the run's objective needs, one target per rollout."""
    return ask(context.teacher, rollouts, context.config, context.masked_token_ids)


def ask(
    teacher: Teacher, rollouts: Sequence[Rollout], config: RunConfig, masked_token_ids: tuple[int, ...] = ()
) -> list[TeacherTargets]:
    """Let the teacher score every completion token, one target per rollout.

    Signal exact asks for hidden states. Signal sparse asks for logprobs of the ids a rollout recorded when the student
    sampled it (support student), of the teacher's own `top_k` (teacher, and where nothing was recorded), or of both
    (union). Signal sampled asks for the logprob of the completion's own tokens.

    Raises:
        OpdError: HIDDEN_NOT_SUPPORTED with the cure; INVALID_RUN_CONFIG for a sampled signal from a completion that the
            student didn't sample.
    """
    if config.signal == "exact" and not teacher.info.supports_hidden:
        raise _no_hidden(teacher)
    if config.signal == "sampled" and any(rollout.source != "student" for rollout in rollouts):
        message = "signal sampled learns from the student's own samples alone; set signal: exact for other completions"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message)
    lengths = [trained_length(rollout) for rollout in rollouts]
    asked = [place for place, length in enumerate(lengths) if length]
    requests = [_request(teacher, rollouts[place], lengths[place], config, masked_token_ids) for place in asked]
    targets = [TeacherTargets()] * len(rollouts)
    for place, request, answer in zip(asked, requests, teacher.score(requests) if requests else [], strict=True):
        targets[place] = _targets(request, answer, config)
    return targets


def trained_length(rollout: Rollout) -> int:
    """Number of completion tokens up to the last one that is trained on."""
    if rollout.trained is None:
        return len(rollout.completion_ids)
    places = np.flatnonzero(rollout.trained)
    return int(places[-1]) + 1 if len(places) else 0


def measures_bias(teacher: Teacher, rollout: Rollout, config: RunConfig) -> bool:
    """Whether the exact divergence is computed at a rollout's tokens too, to tell how far off the run's signal is.

    Whole completions are chosen, each with the probability `exact_fraction`: all hidden states of a completion come
    from the one prefill that is made anyway, while single positions would cost a request each. The choice follows from
    the seed and the tokens, so it is the same after a resume and in the next epoch, when the answer is in the cache.
    The first completion a student samples is always among them, so that a short run is measured too.
    """
    if config.signal == "exact" or not config.exact_fraction or not teacher.info.supports_hidden:
        return False
    if rollout.version == 0 and rollout.drawn_from is not None and rollout.drawn_from[1] == 0:
        return True
    draw = np.random.default_rng([config.seed, zlib.crc32(rollout.teacher_token_ids.tobytes())]).random()
    return bool(draw < config.exact_fraction)


def _no_hidden(teacher: Teacher) -> OpdError:
    why = teacher.info.hidden_refusal or "its head can't be split off"
    message = (
        f"teacher {teacher.info.name} gives no hidden states ({why}), which signal exact needs; set signal: sparse"
    )
    return OpdError(Reason.HIDDEN_NOT_SUPPORTED, message, teacher=teacher.info.name)


def _request(
    teacher: Teacher, rollout: Rollout, length: int, config: RunConfig, masked_token_ids: tuple[int, ...]
) -> ScoreRequest:
    start = rollout.teacher_score_from
    tokens = rollout.teacher_token_ids[: start + length]
    if config.signal == "exact":
        return ScoreRequest(tokens, start, ScoreWants(token_stats=False, hidden=True), None, masked_token_ids)
    support = rollout.support_ids if config.signal == "sparse" and config.support != "teacher" else None
    wants_top = _has_baseline(config) or (config.signal == "sparse" and (support is None or config.support == "union"))
    wants = ScoreWants(
        token_stats=True,
        top_k=config.top_k if wants_top else 1,
        log_z_temperatures=() if config.temperature == 1 else (config.temperature,),
        hidden=measures_bias(teacher, rollout, config),
    )
    return ScoreRequest(tokens, start, wants, None if support is None else support[:length], masked_token_ids)


def _targets(request: ScoreRequest, answer: CachedScores, config: RunConfig) -> TeacherTargets:
    scores = answer.scores
    if config.signal == "exact":
        return TeacherTargets(cached=answer.cached, hidden=_given(scores.hidden), hidden_dtype=scores.hidden_dtype)
    ids, logprobs, tail = _support(request, scores, joins=config.support == "union")
    # A baseline must not depend on the token; without one, the support is what the token's own logprob is read from.
    if config.signal == "sampled" and not _has_baseline(config):
        own = request.token_ids[request.score_from :, None]
        ids, logprobs, tail = union(ids, logprobs, tail, own, _given(scores.token_logprobs)[:, None])
    if config.signal == "sparse" and config.top_mass:
        ids, logprobs, tail = cut_to_mass(ids, logprobs, tail, config.top_mass)
    return TeacherTargets(
        ids=ids,
        logprobs=logprobs,
        tail=tail,
        log_z=_given(scores.log_z)[:, 0] if request.wants.log_z_temperatures else None,
        top_ids=_given(scores.top_ids)[:, 0],
        entropies=_given(scores.entropies),
        cached=answer.cached,
        token_logprobs=_given(scores.token_logprobs),
        hidden=scores.hidden,
        hidden_dtype=scores.hidden_dtype,
    )


def _given(array: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    if array is None:
        raise OpdError(Reason.INTERNAL, "the teacher left out a result it was asked for")
    return array


def _has_baseline(config: RunConfig) -> bool:
    return config.signal == "sampled" and config.divergence_options.get("baseline") == "value"


def _support(request: ScoreRequest, scores: Scores, *, joins: bool) -> tuple[Int32, Float32, Float32]:
    """Ids, logprobs and tail of the support: the top, the candidates where there are some, or both joined."""
    top = _given(scores.top_ids), _given(scores.top_logprobs), _given(scores.top_tail)
    if request.candidate_ids is None:
        return top
    chosen = request.candidate_ids, _given(scores.candidate_logprobs), _given(scores.candidate_tail)
    return union(*top, *chosen[:2]) if joins else chosen


def union(
    top_ids: Int32, top_logprobs: Float32, top_tail: Float32, ids: Int32, logprobs: Float32
) -> tuple[Int32, Float32, Float32]:
    """The teacher's top ids (R, K) and further ids (R, C) as one support, each id once: (R, K+C) twice, and (R,).

    The tail loses the mass of the further ids; where float32 leaves nothing of it, nothing is what it says.
    """
    twice = (ids[:, :, None] == top_ids[:, None, :]).any(axis=-1)
    new_ids = np.where(twice, -1, ids)
    new_logprobs = np.where(new_ids < 0, -np.inf, logprobs)
    rest = np.exp(top_tail.astype(np.float64)) - np.exp(new_logprobs.astype(np.float64)).sum(axis=-1)
    resolved = rest > np.finfo(np.float32).eps * np.exp(top_tail.astype(np.float64))
    tail = np.where(resolved, np.log(np.where(resolved, rest, 1.0)), -np.inf)
    joined_ids = np.concatenate([top_ids, new_ids], axis=-1).astype(np.int32)
    joined = np.concatenate([top_logprobs, new_logprobs], axis=-1).astype(np.float32)
    return joined_ids, joined, tail.astype(np.float32)


def cut_to_mass(ids: Int32, logprobs: Float32, tail: Float32, mass: float) -> tuple[Int32, Float32, Float32]:
    """Keep of every row the first ids (R, K) that hold this much of the teacher's mass; the others go to the tail.

    The first id is always kept. Columns that no row uses any more are dropped.
    """
    before = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=-1)[:, :-1]
    kept = np.concatenate([np.ones((len(ids), 1), np.bool_), before < mass], axis=-1) & (ids >= 0)
    dropped = np.logaddexp.reduce(np.where(kept, -np.inf, logprobs), axis=-1)
    width = int(np.flatnonzero(kept.any(axis=0)).max()) + 1
    return (
        np.where(kept, ids, -1)[:, :width].astype(np.int32),
        np.where(kept, logprobs, -np.inf)[:, :width].astype(np.float32),
        np.logaddexp(tail, dropped).astype(np.float32),
    )
