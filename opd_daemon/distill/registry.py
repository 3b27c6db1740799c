"""The divergences there are and what each may be asked for, without MLX, so that the daemon can check a run.

A combination that can be written down but can't work is refused with the mathematical reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opd_daemon.config import RunConfig, config_violations
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.trainer import DivergenceInfo

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

TRUNCATED = (
    "without the tail the sum over a few ids is no divergence: it isn't 0 where the models agree, and falls below 0 as "
    "the student moves mass off the ids; keep the tail"
)
REFUSED: dict[tuple[str, Any], str] = {
    ("estimator", "k1"): (
        "back-propagating log s − log t of sampled tokens gives a gradient whose expectation is 0, as Σ s·∇log s = 0; "
        "leave the estimator out: signal 'sampled' uses the score function"
    ),
    ("estimator", "k2"): "½(log s − log t)² has the gradient of the score function but another value; leave it out",
    ("estimator", "k3"): (
        "back-propagating t/s − 1 − log t/s of sampled tokens follows the gradient of the forward KL, not of the "
        "reverse; leave the estimator out, or choose forward_kl with the signal exact or sparse"
    ),
    ("advantage", "top_k"): (
        "a divergence over the top k is one number for all tokens, and Σ s·∇log s = 0 makes its expected gradient 0; "
        "use signal 'sparse', which differentiates it, or the sampled token's own advantage"
    ),
    ("tail", False): TRUNCATED,
    ("tail", "truncated"): TRUNCATED,
}
NOT_SAMPLED = (
    "tokens the student sampled estimate expectations under the student alone, so only the reverse KL can be had from "
    "them; use signal 'exact' or 'sparse', or divergence 'reverse_kl'"
)


class Options(BaseModel):
    """Options every divergence has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_clip: Positive | None = Field(
        None, description="Largest divergence of a token, in nats: above it a token has no gradient."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str | bool) and (reason := REFUSED.get((name, value))):
                raise ValueError(f"{name} {value}: {reason}")
        if isinstance(values, dict) and values.get("tail") is True:
            return {name: value for name, value in values.items() if name != "tail"}
        return values


class KlOptions(Options):
    """Options of the forward KL."""

    tail: Literal["kept", "renormalised"] = Field(
        "kept",
        description="Signal sparse: 'renormalised' is an ablation that forgets the mass outside the ids on both sides.",
    )


class ReverseKlOptions(KlOptions):
    """Options of the reverse KL. The last two are for the signal sampled."""

    baseline: Literal["none", "value"] = Field(
        "none", description="Signal sampled: 'value' subtracts the divergence over the teacher's top_k: less variance."
    )
    importance_clip: Positive | None = Field(
        None, description="Signal sampled: weigh tokens by student / sampling student, at most this."
    )


class JsdOptions(Options):
    """Options of the generalised Jensen-Shannon divergence."""

    beta: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of the teacher in the mixture; 0 is the forward KL, 1 the reverse KL."
    )


class SkewOptions(Options):
    """Options of the skew divergences."""

    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of the first distribution that is mixed into the second."
    )


def _built_in(name: str, options: BaseModel, temperature: float) -> Any:
    from opd_daemon.distill.divergences import built_in

    return built_in(name, options, temperature)


def _info(name: str, summary: str, options: type[Options], *signals: str) -> DivergenceInfo:
    return DivergenceInfo(name, summary, partial(_built_in, name), options, ("exact", "sparse", *signals))


BUILT_IN: dict[str, DivergenceInfo] = {
    info.name: info
    for info in (
        _info("forward_kl", "KL(teacher ‖ student): the student covers all the teacher says", KlOptions),
        _info(
            "reverse_kl",
            "KL(student ‖ teacher): the student says only what the teacher would",
            ReverseKlOptions,
            "sampled",
        ),
        _info("jsd", "β·KL(T ‖ M) + (1−β)·KL(S ‖ M), M = βT + (1−β)S: between the two KLs", JsdOptions),
        _info("skew_forward_kl", "KL(T ‖ αT + (1−α)S): a forward KL whose gradients stay bounded", SkewOptions),
        _info("skew_reverse_kl", "KL(S ‖ αS + (1−α)T): a reverse KL whose gradients stay bounded", SkewOptions),
        _info("total_variation", "½·Σ |s − t|: what speculative decoding would reject", Options),
    )
}


def find(name: str, offered: Mapping[str, DivergenceInfo] | None = None) -> DivergenceInfo:
    """The divergence of that name, built in or offered by a plugin.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming those there are.
    """
    known = BUILT_IN | dict(offered or {})
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    message = f"no divergence {name!r}; {hint}there are {', '.join(known)}"
    raise OpdError(Reason.INVALID_RUN_CONFIG, message, divergence=name)


def create(info: DivergenceInfo, options: Mapping[str, Any], *, temperature: float, signal: str | None = None) -> Any:
    """The divergence itself, at a temperature, from checked options.

    Raises:
        OpdError: INVALID_RUN_CONFIG with the reason for options or a signal it doesn't take.
    """
    faults = check(info, options, signal)
    if not 0 < temperature < float("inf"):
        faults.append(FieldViolation("temperature", f"{temperature}: give a number above 0"))
    if faults:
        text = "; ".join(f"{fault.field.rpartition('.')[2]} {fault.description}" for fault in faults)
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"divergence {info.name}: {text}", divergence=info.name)
    divergence = info.factory(info.options.model_validate(dict(options)), temperature)
    divergence.signal = signal
    return divergence


def check(info: DivergenceInfo, options: Mapping[str, Any], signal: str | None) -> list[FieldViolation]:
    """What is wrong with the options, or with asking for this signal; None is any the divergence can be had from."""
    if signal is not None and signal not in info.signals:
        known = ", ".join(info.signals)
        reason = NOT_SAMPLED if signal == "sampled" and info.name in BUILT_IN else f"it can be had from {known}"
        return [FieldViolation("config.signal", f"{signal}: {reason}")]
    try:
        chosen = info.options.model_validate(dict(options))
    except ValidationError as fault:
        known = ", ".join(info.options.model_fields) or "none"
        return [
            FieldViolation(entry.field, f"is no option of {info.name}, which has {known}")
            if error["type"] == "extra_forbidden"
            else entry
            for entry, error in zip(
                config_violations(fault, "config.divergence_options"), fault.errors(include_url=False), strict=True
            )
        ]
    return [
        FieldViolation(f"config.divergence_options.{name}", f"is for the signal {needed}, not {signal}")
        for name, (neutral, needed) in ONLY_FOR.items()
        if signal not in {None, needed} and getattr(chosen, name, neutral) != neutral
    ]


# Options that mean something with one signal only: their value that does nothing, and that signal.
ONLY_FOR: dict[str, tuple[Any, str]] = {
    "tail": ("kept", "sparse"),
    "baseline": ("none", "sampled"),
    "importance_clip": (None, "sampled"),
}


def check_config(
    config: RunConfig, offered: Mapping[str, DivergenceInfo] | None = None, *, on_policy: bool = True
) -> list[FieldViolation]:
    """What is wrong with the divergence a run asks for. on_policy: its trainer samples from the student."""
    try:
        info = find(config.divergence, offered)
    except OpdError as fault:
        return [FieldViolation("config.divergence", fault.message)]
    faults = check(info, config.divergence_options, config.signal) + _check_support(config)
    if config.signal == "sampled" and not faults:
        faults += _check_sampling(config, on_policy=on_policy)
    return faults


def _check_support(config: RunConfig) -> list[FieldViolation]:
    faults = []
    if config.top_mass and config.signal != "sparse":
        message = f"{config.top_mass:g}: cuts the ids of signal sparse, and this is {config.signal}; set 0"
        faults.append(FieldViolation("config.top_mass", message))
    if config.signal == "sparse" and config.top_k == 1 and config.divergence_options.get("tail") == "renormalised":
        message = "1: one id renormalised has the mass 1 in both models, so nothing would be learned; use 2 or more"
        faults.append(FieldViolation("config.top_k", message))
    return faults


def _check_sampling(config: RunConfig, *, on_policy: bool) -> list[FieldViolation]:
    if not on_policy:
        message = f"sampled: trainer {config.trainer} learns from completions the student didn't sample; use exact"
        return [FieldViolation("config.signal", message)]
    weighed = config.divergence_options.get("importance_clip") is not None
    needed = 1.0 if weighed else config.temperature
    if config.generation_temperature == needed:
        return []
    why = (
        "importance ratios are known for samples at temperature 1"
        if weighed
        else f"the expectation is over samples at the loss temperature {config.temperature:g}"
    )
    message = f"{config.generation_temperature:g}: with signal sampled, {why}; set {needed:g}, or use signal exact"
    return [FieldViolation("config.generation_temperature", message)]
