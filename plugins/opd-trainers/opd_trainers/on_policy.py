"""On-policy distillation: the student learns on what it says itself.

Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD with λ = 1): y ~ student(·|x), then minimise
D(teacher ‖ student) at every token of y. The samples are taken as given; no gradient goes through sampling.
"""

from __future__ import annotations

from typing import cast

from opd_daemon.distill import backward, micro_batches, score
from opd_daemon.trainer import TrainContext
from opd_trainers.ahead import OneAhead
from opd_trainers.options import OnPolicyOptions
from opd_trainers.sampling import sample


class OnPolicy:
    """Sample, score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on its own completions.

        The cross-entropy, if it has weight, aims at the teacher's most likely token: the student's own samples would
        teach it nothing.
        """
        options = cast(OnPolicyOptions, context.options)
        context.loop.samples_per_prompt = options.samples_per_prompt
        if options.staleness:
            with OneAhead(context, options) as ahead:
                self._train_ahead(context, ahead)
            return

        for step in context.loop:
            with step.phase("rollout"):
                prompts = [prompt for prompt in step.prompts for _ in range(options.samples_per_prompt)]
                rollouts = sample(context, options, prompts, seed=step.seed, version=step.number - 1)
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = score(context, rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="teacher"):
                    step.accumulate(backward(context, batch))
                step.update()

    def _train_ahead(self, context: TrainContext, ahead: OneAhead) -> None:
        """The same with staleness 1: two steps' rollouts at once, the second ones scored while the first ones train."""
        for step in context.loop:
            with step.phase("rollout"):
                rollouts, scoring = ahead.take(step)
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = scoring.result()

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="teacher"):
                    step.accumulate(backward(context, batch))
                step.update()
