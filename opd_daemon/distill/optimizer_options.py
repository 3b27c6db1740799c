"""Options of the optimizers, by mlx's names; checked before anything loads, so without MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opd_daemon.config import config_violations
from opd_daemon.errors import FieldViolation, Reason, violations_error

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdamOptions(_Options):
    """Of adam and adamw. Unlike mlx's own default, the bias of the first steps is corrected."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    bias_correction: bool = True


class AdafactorOptions(_Options):
    """Of adafactor. The learning rate is the run's; scale_parameter multiplies it by each tensor's own size.

    Unlike mlx's own default that is off: one matrix of a fresh adapter is 0 and would hardly move.
    """

    eps: tuple[Positive, Positive] = (1e-30, 1e-3)
    clip_threshold: Positive = 1.0
    decay_rate: Annotated[float, Field(lt=0, ge=-1)] = -0.8
    beta_1: Share | None = None
    scale_parameter: bool = False


class LionOptions(_Options):
    """Of lion."""

    betas: tuple[Share, Share] = (0.9, 0.99)


class MuonOptions(_Options):
    """Of muon."""

    momentum: Share = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5


class SgdOptions(_Options):
    """Of sgd."""

    momentum: Share = 0.0
    dampening: Share = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptions:
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("nesterov needs a momentum, and no dampening")
        return self


OPTIONS: dict[str, type[_Options]] = {
    "adamw": AdamOptions,
    "adam": AdamOptions,
    "adafactor": AdafactorOptions,
    "lion": LionOptions,
    "muon": MuonOptions,
    "sgd": SgdOptions,
}


def optimizer_faults(config: RunConfig) -> list[FieldViolation]:
    """What is wrong with a configuration's optimizer and its options."""
    faults = []
    kind = OPTIONS[config.optimizer]
    try:
        kind.model_validate(config.optimizer_options)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        for violation, entry in zip(config_violations(error, "config.optimizer_options"), error.errors(), strict=True):
            unknown = entry["type"] == "extra_forbidden"
            message = f"optimizer {config.optimizer} has no such option; it has {known}"
            faults.append(FieldViolation(violation.field, message) if unknown else violation)
    if config.weight_decay and config.optimizer == "adam":
        message = f"{config.weight_decay}: optimizer adam has no weight decay; use adamw, or 0"
        faults.append(FieldViolation("config.weight_decay", message))
    return faults


def optimizer_settings(config: RunConfig) -> dict[str, Any]:
    """Arguments of mlx's optimizer besides the learning rate.

    Raises:
        OpdError: INVALID_RUN_CONFIG with one violation per fault.
    """
    if faults := optimizer_faults(config):
        raise violations_error(faults, Reason.INVALID_RUN_CONFIG)
    settings = OPTIONS[config.optimizer].model_validate(config.optimizer_options).model_dump()
    if config.optimizer == "adafactor":
        settings["relative_step"] = False
    return settings if config.optimizer == "adam" else {**settings, "weight_decay": config.weight_decay}
