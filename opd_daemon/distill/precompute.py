"""All that an off-policy run will ask its teacher, asked beforehand: so the teacher can leave before the student comes.

Every request is made exactly as training and evaluation will make it again, so that the daemon's cache answers them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from opd_daemon.config import RunConfig
from opd_daemon.distill.data import Prompt, PromptSet
from opd_daemon.distill.evaluation import ask_ahead, greedy_completions
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.live_preflight import check_teacher, checkable
from opd_daemon.distill.rollouts import Rollout, reference_completions, teacher_completions
from opd_daemon.distill.scoring import ask
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import Teacher, TrainerInfo

# The teacher decodes this many sequences at once for little more than the price of a few.
AT_ONCE = 32


def precompute(
    teacher: Teacher,
    prompts: PromptSet,
    config: RunConfig,
    *,
    trainer: TrainerInfo,
    masked_token_ids: tuple[int, ...],
    journal: Journal,
) -> None:
    """Let the teacher answer everything, fetch its head, then free its memory, unless another run needs it.

    Raises:
        OpdError: INVALID_RUN_CONFIG when answers were thrown out again before all were there.
    """
    started = time.monotonic()
    needed = needed_prompts(prompts, config)
    total = len(prompts.held_out) + len(needed)
    journal.log(f"the teacher computes ahead what this run will ask about {total} prompts")
    ask_ahead(teacher, prompts.held_out, config, masked_token_ids)
    if written := checkable(greedy_completions(teacher, prompts.held_out, config, masked_token_ids)):
        check_teacher(teacher, written, masked_token_ids)
    done = len(prompts.held_out)
    for start in range(0, len(needed), AT_ONCE):
        some = needed[start : start + AT_ONCE]
        for rollouts in completions(teacher, some, config, trainer, masked_token_ids):
            if trainer.uses_teacher:
                ask(teacher, rollouts, config, masked_token_ids)
        done += len(some)
        journal.gauges({"precomputed_prompts": done, "prompts_to_precompute": total})
    if teacher.info.supports_hidden:
        teacher.head()
    # The first answers are the first ones a full cache gives up.
    if not ask_ahead(teacher, prompts.held_out, config, masked_token_ids):
        message = "the teacher cache is smaller than what this run asks; raise its limit, or set precompute false"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message)
    journal.log(f"the teacher's answers are in the cache after {time.monotonic() - started:.0f} s")
    _unload(teacher, journal)


def needed_prompts(prompts: PromptSet, config: RunConfig) -> list[Prompt]:
    """The training prompts that the run gets to, each once, in the order of their first use."""
    count = config.num_steps * config.batch_size * config.gradient_accumulation_steps
    return list({prompt.index: prompt for prompt in prompts.take(0, count)}.values())


def completions(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    config: RunConfig,
    trainer: TrainerInfo,
    masked_token_ids: tuple[int, ...],
) -> Iterator[list[Rollout]]:
    """What the trainer trains on at these prompts, from each of its sources."""
    sources = trainer.sources(config, trainer.options.model_validate(config.trainer_options))
    length = config.max_generation_tokens
    if sources.get("teacher"):
        yield teacher_completions(
            teacher,
            prompts,
            max_tokens=length,
            temperature=config.generation_temperature,
            seed=config.seed,
            masked_token_ids=masked_token_ids,
        )
    if sources.get("data"):
        yield reference_completions(prompts, length)


def _unload(teacher: Teacher, journal: Journal) -> None:
    try:
        teacher.unload()
    except OpdError as refusal:
        if refusal.reason is not Reason.TEACHER_IN_USE:
            raise
        journal.log("the teacher stays in memory, as another run needs it")
    else:
        journal.log("the teacher is unloaded; its cache answers from now on")
