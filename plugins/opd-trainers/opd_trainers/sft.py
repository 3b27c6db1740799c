"""Supervised fine-tuning: the baseline every distillation has to beat at equal compute.

On the teacher's completions this is sequence-level distillation (Kim & Rush 2016): its words without its distributions.
"""

from __future__ import annotations

from dataclasses import replace

from opd_daemon.distill import backward, micro_batches
from opd_daemon.trainer import TrainContext
from opd_trainers.completions import Completions


class SupervisedFineTuning:
    """Complete, cross-entropy, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on the words of the teacher's completions, or the data's: nothing else is in the loss."""
        context = replace(context, objective=replace(context.objective, kl_weight=0.0, ce_weight=1.0))
        completions = Completions(context)

        for step in context.loop:
            with step.phase("rollout"):
                rollouts = completions.of(step.prompts)
            step.log_rollouts(rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, None, labels="completion"):
                    step.accumulate(backward(context, batch))
                step.update()
