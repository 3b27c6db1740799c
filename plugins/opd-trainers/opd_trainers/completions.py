"""Completions that don't depend on the student: the teacher's, or the data's."""

from __future__ import annotations

from collections.abc import Sequence

from opd_daemon.distill import Prompt, Rollout, read_rollouts, reference_completions, teacher_completions
from opd_daemon.trainer import TrainContext

# The teacher decodes this many sequences at once for little more than the price of a few.
AHEAD = 32


class Completions:
    """One completion per prompt, the same in every epoch and after a resume.

    With `use_teacher_targets` the teacher writes them, some steps ahead; else they are the data's own.
    """

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        prompts = {prompt.index: prompt for prompt in context.prompts.train}
        resumed = read_rollouts(context.folders.rollouts, prompts) if context.resume_from else []
        self.known = {rollout.prompt.index: rollout for rollout in resumed}

    def of(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Completions of these prompts; if one is new, it and those of the next steps are generated in one call."""
        config = self.context.config
        if not config.use_teacher_targets:
            return reference_completions(prompts, config.max_generation_tokens)
        if any(prompt.index not in self.known for prompt in prompts):
            coming = {prompt.index: prompt for prompt in self.context.loop.upcoming(AHEAD)}
            self._generate([prompt for index, prompt in coming.items() if index not in self.known])
        return [self.known[prompt.index] for prompt in prompts]

    def _generate(self, prompts: Sequence[Prompt]) -> None:
        rollouts = teacher_completions(
            self.context.teacher,
            prompts,
            max_tokens=self.context.config.max_generation_tokens,
            temperature=self.context.config.generation_temperature,
            seed=self.context.config.seed,
            masked_token_ids=self.context.masked_token_ids,
        )
        self.known |= {rollout.prompt.index: rollout for rollout in rollouts}
