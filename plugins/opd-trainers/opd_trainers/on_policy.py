"""On-policy distillation: the student learns on what it says itself.

Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD with λ = 1): y ~ student(·|x), then minimise
D(teacher ‖ student) at every token of y. The samples are taken as given; no gradient goes through sampling.
"""

from __future__ import annotations

from opd_daemon.distill import backward, micro_batches, sample_completions, score
from opd_daemon.trainer import TrainContext


class OnPolicy:
    """Sample, score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on its own completions.

        With support "student" the divergence is over the ids the student found most likely while it sampled. They are
        recorded from the logits that sampling computes anyway, which saves another forward; where decoding rounds a
        little differently from training, a slightly different set of ids is as good, since the tail carries the rest.
        The cross-entropy, if it has weight, aims at the teacher's most likely token: the student's own samples would
        teach it nothing.
        """
        config, student = context.config, context.student

        for step in context.loop:
            with step.phase("rollout"):
                rollouts = sample_completions(
                    student,
                    step.prompts,
                    max_tokens=config.max_generation_tokens,
                    temperature=config.generation_temperature,
                    seed=step.seed,
                    support=config.top_k if config.support == "student" else 0,
                )
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = score(context, rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="teacher"):
                    step.accumulate(backward(context, batch))
                step.update()
