"""Distillation on given completions: the teacher says what it would have thought of every token of the data's answers.

Hinton et al. 2015, token by token.
"""

from __future__ import annotations

from opd_daemon.distill import backward, micro_batches, reference_completions, score
from opd_daemon.trainer import TrainContext


class Dataset:
    """Look up, score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on the data's completions, cut at `max_generation_tokens`.

        The cross-entropy aims at the completion's own tokens.
        """
        for step in context.loop:
            with step.phase("rollout"):
                rollouts = reference_completions(step.prompts, context.config.max_generation_tokens)
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = score(context, rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="completion"):
                    step.accumulate(backward(context, batch))
                step.update()
