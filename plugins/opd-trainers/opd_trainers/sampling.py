"""The student's own completions as its trainers need them: sampled by the options, masked where they say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_daemon.distill import Prompt, Rollout, sample_completions
from opd_daemon.trainer import TrainContext
from opd_trainers.options import SamplingOptions


def sample(
    context: TrainContext, options: SamplingOptions, prompts: Sequence[Prompt], *, seed: int, version: int
) -> list[Rollout]:
    """Let the student, as it is after `version` updates, continue prompts.

    With signal sparse and a support that isn't the teacher's, the ids the student found most likely are recorded from
    the logits that sampling computes anyway, which saves another forward; where decoding rounds a little differently
    from training, a slightly different set of ids is as good, since the tail carries the rest.
    """
    config = context.config
    records = config.signal == "sparse" and config.support != "teacher"
    rollouts = sample_completions(
        context.student,
        prompts,
        max_tokens=min(config.max_generation_tokens, options.prefix_tokens or config.max_generation_tokens),
        temperature=config.generation_temperature,
        seed=seed,
        support=config.top_k if records else 0,
        repetition_guard=options.repetition_guard,
        version=version,
    )
    return [untrained(rollout) if masks(options, rollout) else rollout for rollout in rollouts]


def masks(options: SamplingOptions, rollout: Rollout) -> bool:
    """Whether a completion is kept out of training."""
    truncated = options.mask_truncated and rollout.stopped == "length"
    return truncated or (options.mask_repetition and rollout.stopped == "repetition")


def untrained(rollout: Rollout) -> Rollout:
    """The completion with every position masked: the teacher isn't asked about it and the student doesn't learn it."""
    return replace(rollout, trained=np.zeros(len(rollout.completion_ids), dtype=np.bool_))
