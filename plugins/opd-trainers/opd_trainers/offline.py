"""Offline distillation: the student learns the teacher's distributions on completions that don't depend on it.

Hinton et al. 2015 for the soft targets; Kim & Rush 2016 for letting the teacher write the completions.
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_daemon.distill import (
    Prompt,
    Rollout,
    backward,
    micro_batches,
    read_rollouts,
    reference_completions,
    score,
    teacher_completions,
)
from opd_daemon.trainer import TrainContext


class Offline:
    """Complete, score, divergence, backward, step."""

    def train(self, context: TrainContext) -> None:
        """Train the student on the teacher's completions, or on the data's where `use_teacher_targets` is false.

        The divergence is always over the teacher's own top ids, so its answers come from the cache from the second
        epoch on. The cross-entropy aims at the completion's own tokens.
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


# The teacher decodes this many sequences at once for little more than the price of a few.
AHEAD = 32


class Completions:
    """One completion per prompt, the same in every epoch and after a resume, generated some steps ahead."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        prompts = {prompt.index: prompt for prompt in context.prompts.train}
        resumed = read_rollouts(context.folders.rollouts, prompts) if context.resume_from else []
        self.known = {rollout.prompt.index: rollout for rollout in resumed}

    def of(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Completions of these prompts; if one is new, it and those of the next steps are generated in one call."""
        if any(prompt.index not in self.known for prompt in prompts):
            coming = {prompt.index: prompt for prompt in self.context.loop.upcoming(AHEAD)}
            new = [prompt for index, prompt in coming.items() if index not in self.known]
            self.known |= {rollout.prompt.index: rollout for rollout in self._complete(new)}
        return [self.known[prompt.index] for prompt in prompts]

    def _complete(self, prompts: list[Prompt]) -> list[Rollout]:
        config = self.context.config
        if not config.use_teacher_targets:
            return reference_completions(prompts, config.max_generation_tokens)
        return teacher_completions(
            self.context.teacher,
            prompts,
            max_tokens=config.max_generation_tokens,
            temperature=config.generation_temperature,
            seed=config.seed,
        )
