"""Mixed distillation: some steps on the student's own samples, the others on completions that don't depend on it.

Agarwal et al. 2024, "On-Policy Distillation of Language Models", algorithm 1: with probability λ a batch is sampled by
the student, else it comes from the fixed data. Here λ may change over the run.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from opd_daemon.distill import backward, micro_batches, score
from opd_daemon.trainer import TrainContext
from opd_trainers.completions import Completions
from opd_trainers.options import MixedOptions
from opd_trainers.sampling import sample


class Mixed:
    """Draw, then sample or complete; score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on both kinds of completions.

        A step's draw is a function of its seed alone. The cross-entropy aims at the teacher's most likely token on the
        student's samples, at the completion's own tokens elsewhere.
        """
        options = cast(MixedOptions, context.options)
        completions = Completions(context)

        for step in context.loop:
            share = options.share((step.number - 1) / max(1, context.config.num_steps - 1))
            on_policy = np.random.default_rng([step.seed, context.config.seed]).random() < share
            with step.phase("rollout"):
                if on_policy:
                    rollouts = sample(context, options, step.prompts, seed=step.seed, version=step.number - 1)
                else:
                    rollouts = completions.of(step.prompts)
            step.log_rollouts(rollouts)

            with step.phase("score"):
                targets = score(context, rollouts)

            with step.phase("train"):
                for batch in micro_batches(context, rollouts, targets, labels="teacher" if on_policy else "completion"):
                    step.accumulate(backward(context, batch))
                step.update()
