"""Offline distillation: the student learns the teacher's distributions on completions that don't depend on it.

Hinton et al. 2015 for the soft targets; Kim & Rush 2016 for letting the teacher write the completions.
"""

from __future__ import annotations

from opd_daemon.distill import backward, micro_batches, score
from opd_daemon.trainer import TrainContext
from opd_trainers.completions import Completions


class Offline:
    """Complete, score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on the teacher's completions, or on the data's where `use_teacher_targets` is false.

        Nothing the teacher is asked depends on the student, so its answers come from the cache from the second epoch
        on. The cross-entropy aims at the completion's own tokens.
        """
        completions = Completions(context)

        for step in context.loop:
            with step.phase("rollout"):
                rollouts = completions.of(step.prompts)
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = score(context, rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="completion"):
                    step.accumulate(backward(context, batch))
                step.update()
