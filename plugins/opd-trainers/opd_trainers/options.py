"""Options of the trainers, and what of a configuration goes with them. The daemon imports this: nothing heavy here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from opd_daemon.config import RunConfig


def _at_least_twice(value: int) -> int:
    if value == 1:
        raise ValueError("everything has been said once; use 0 for no guard, or 2 and more")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Repeats = Annotated[int, Field(ge=0, le=1000), AfterValidator(_at_least_twice)]


class SamplingOptions(BaseModel):
    """How the student samples what it is trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix_tokens: int = Field(
        0, ge=0, le=131_072, description="Sample, score and train only the first tokens of a completion; 0: all."
    )
    mask_truncated: bool = Field(
        False, description="Don't score or train completions cut off at max_generation_tokens; metrics count them."
    )
    repetition_guard: Repeats = Field(
        0, description="End a completion that says the same phrase this many times in a row; 0: let it go on."
    )
    mask_repetition: bool = Field(True, description="Don't score or train completions that the guard ended.")

    @model_validator(mode="after")
    def _some_can_finish(self) -> SamplingOptions:
        if self.mask_truncated and self.prefix_tokens:
            raise ValueError("mask_truncated would leave nothing of prefixes; set prefix_tokens or mask_truncated")
        return self


class OnPolicyOptions(SamplingOptions):
    """Options of `on_policy`."""

    samples_per_prompt: int = Field(
        1, ge=1, le=4096, description="Completions of each prompt; a step then takes so many fewer prompts."
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="1: sample the completions of two steps together, which halves the decoding; those of every second "
        "step are then one update old, and the teacher scores them while the student trains.",
    )


class MixedOptions(SamplingOptions):
    """Options of `mixed`."""

    on_policy_fraction: Share = Field(0.5, description="Share of steps on the student's own samples, at the start.")
    on_policy_fraction_end: Share | None = Field(
        None, description="The same at the end of the run, reached in equal strides; none: it stays."
    )

    def share(self, progress: float) -> float:
        """Probability of an on-policy step when this part of the run is done, 0 … 1."""
        end = self.on_policy_fraction if self.on_policy_fraction_end is None else self.on_policy_fraction_end
        return self.on_policy_fraction + (end - self.on_policy_fraction) * progress


def on_policy_faults(config: RunConfig, options: BaseModel) -> Iterable[tuple[str, str]]:
    """What `on_policy` can't do."""
    chosen = cast(OnPolicyOptions, options)
    if chosen.staleness and config.signal == "sampled" and config.divergence_options.get("importance_clip") is None:
        why = "with signal sampled, tokens of an older student need weights"
        yield "trainer_options.staleness", f"1: {why}; set divergence_options.importance_clip, or staleness 0"
    samples = chosen.samples_per_prompt
    sequences = config.batch_size * config.gradient_accumulation_steps
    if sequences % samples:
        whole = f"the {sequences} sequences of a step (batch_size × gradient_accumulation_steps)"
        yield "trainer_options.samples_per_prompt", f"{samples}: does not divide {whole}; change one of the three"


def off_policy_sources(config: RunConfig, _options: BaseModel) -> Mapping[str, float]:
    """The teacher writes the completions, or the data gives them."""
    return {"teacher": 1.0} if config.use_teacher_targets else {"data": 1.0}


def dataset_sources(_config: RunConfig, _options: BaseModel) -> Mapping[str, float]:
    """The data gives every completion."""
    return {"data": 1.0}


def mixed_sources(config: RunConfig, options: BaseModel) -> Mapping[str, float]:
    """The student samples its share over the whole run, the rest is as off-policy."""
    student = cast(MixedOptions, options).share(0.5)
    others = off_policy_sources(config, options) if student < 1 else {}
    own = {"student": student} if student else {}
    return {**own, **{name: (1.0 - student) * share for name, share in others.items()}}
