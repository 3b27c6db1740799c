"""What is checked before a run is accepted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill.registry import check_config as check_divergence
from opd_daemon.errors import FieldViolation, OpdError, Reason, violations_error
from opd_daemon.paths import RUN_PATHS
from opd_daemon.plugins import PluginRegistry
from opd_daemon.runs.preflight import Preflight
from opd_daemon.trainer import TrainerInfo

# The checks across fields come after those of single ones: one round for each, and one that succeeds.
ROUNDS = 4
NEEDED = frozenset({"base_model_path", "teacher_model_path", "prompts_path"})
STAND_IN = "?"


def request_digest(values: dict[str, Any]) -> str:
    """What tells one request from another with the same id."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


async def checked_config(
    values: dict[str, Any], plugins: PluginRegistry, preflight: Preflight, taken_ids: set[str]
) -> RunConfig:
    """The validated configuration of a new run.

    Raises:
        OpdError: INVALID_RUN_CONFIG with every fault that could be found, those of fields and those of files.
    """
    config, faults = _parsed(values)
    if config is not None:
        known = {fault.field for fault in faults}
        found = await preflight.run(_faults, config.expanded(), plugins, preflight, taken_ids)
        found = [_as_written(fault, config) for fault in found]
        faults += [fault for fault in found if fault.field not in known]
    if faults or config is None:
        raise violations_error(faults, Reason.INVALID_RUN_CONFIG)
    return config.expanded()


def _as_written(fault: FieldViolation, config: RunConfig) -> FieldViolation:
    """A fault that names the path as the client wrote it: what `~` stands for here is nobody else's business."""
    description, expanded = fault.description, config.expanded()
    for name in RUN_PATHS:
        written = getattr(config, name)
        description = description.replace(getattr(expanded, name), written) if written else description
    return replace(fault, description=description)


def _parsed(values: dict[str, Any]) -> tuple[RunConfig | None, list[FieldViolation]]:
    """The configuration with stand-ins for its faulty fields, so that the others are checked too, and the faults."""
    faults: list[FieldViolation] = []
    sound = dict(values)
    for _ in range(ROUNDS):
        try:
            return parse_config(sound), faults
        except OpdError as fault:
            faults += [entry for entry in fault.violations if entry not in faults]
            faulty = {entry.field.split(".")[1] for entry in fault.violations}
        sound = {name: value for name, value in sound.items() if name not in faulty}
        sound |= dict.fromkeys(faulty & NEEDED, STAND_IN)
        sound |= {"kl_weight": 1.0} if "kl_weight" in faulty else {}
    return None, faults


def _faults(
    config: RunConfig, plugins: PluginRegistry, preflight: Preflight, taken_ids: set[str]
) -> list[FieldViolation]:
    faults = []
    # Many disks know a name in one spelling only.
    if config.run_id.casefold() in {name.casefold() for name in taken_ids}:
        faults.append(FieldViolation("config.run_id", f"{config.run_id!r} is taken; choose another or leave it empty"))
    trainer = None
    try:
        trainer = plugins.trainer(config.trainer)
    except OpdError as fault:
        faults.append(FieldViolation("config.trainer", fault.message))
    faults += check_divergence(config, plugins.divergences, on_policy=_learns_from_itself(config, trainer))
    named = {fault.field for fault in faults}
    return faults + [fault for fault in preflight.check(config, trainer) if fault.field not in named]


def _learns_from_itself(config: RunConfig, trainer: TrainerInfo | None) -> bool:
    """Whether all completions are the student's own; so they are taken to be where trainer or options are faulty."""
    if trainer is None:
        return True
    try:
        shares = trainer.sources(config, trainer.options.model_validate(config.trainer_options))
    except ValidationError:
        return True
    return all(source == "student" for source, share in shares.items() if share)
