"""Everything about a run that can be checked in a second, before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from opd_daemon.config import RunConfig, config_violations
from opd_daemon.distill.adapter import adapter_faults
from opd_daemon.distill.data import Row, scan_rows
from opd_daemon.distill.model_folder import ModelFolder, read_model_folder
from opd_daemon.distill.planning import estimate
from opd_daemon.errors import FieldViolation, OpdError
from opd_daemon.vocabulary import compare_vocabularies, load_vocabulary

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainerInfo

__all__ = ["check_run", "estimate"]

FAULTS_SHOWN = 5


def check_run(config: RunConfig, trainer: TrainerInfo | None) -> list[FieldViolation]:
    """One violation per fault of a run: folders, adapter, rows, options, output and tokenizers. Empty: it may start.

    Without a trainer, whose name was wrong, its options are not checked.
    """
    violations = [*(_check_options(config, trainer) if trainer else ()), *_check_output(config)]
    folders: dict[str, ModelFolder] = {}
    for name in ("base_model_path", "teacher_model_path"):
        try:
            folders[name] = read_model_folder(Path(getattr(config, name)))
        except OpdError as fault:
            violations.append(_violation(name, fault.message))
    base, teacher = folders.get("base_model_path"), folders.get("teacher_model_path")
    if base and config.student_adapter_path:
        faults = adapter_faults(Path(config.student_adapter_path), base.tensors, base.bits)
        violations += [_violation("student_adapter_path", fault) for fault in faults]
    if base and teacher:
        violations += _check_tokenizers(config, base, teacher)
        violations += _check_context(config, base, teacher)
    violations += _check_rows(config)
    return violations


def _check_options(config: RunConfig, trainer: TrainerInfo) -> list[FieldViolation]:
    try:
        trainer.options.model_validate(config.trainer_options)
    except ValidationError as fault:
        found = config_violations(fault, "config.trainer_options")
        known = ", ".join(trainer.options.model_fields) or "none"
        return [
            FieldViolation(entry.field, f"trainer {trainer.name} has no such option; it has {known}")
            if error["type"] == "extra_forbidden"
            else entry
            for entry, error in zip(found, fault.errors(), strict=True)
        ]
    return []


def _check_output(config: RunConfig) -> list[FieldViolation]:
    if not config.output_adapter_path:
        return []
    path = Path(config.output_adapter_path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # told below, by the folder that is there
    except OSError as fault:
        return [_violation("output_adapter_path", f"{path}: {fault.strerror}; choose another folder")]
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(existing):  # noqa: PTH112 - unlike Path.is_dir, never raises
        return [_violation("output_adapter_path", f"{path}: {existing} is a file, not a folder; choose another")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [_violation("output_adapter_path", f"{path}: {existing} is not writable; choose another folder")]
    return []


def _check_tokenizers(config: RunConfig, base: ModelFolder, teacher: ModelFolder) -> list[FieldViolation]:
    vocabularies = []
    for name, folder in (("teacher_model_path", teacher), ("base_model_path", base)):
        try:
            vocabularies.append(load_vocabulary(folder.path))
        except OpdError as fault:
            return [_violation(name, fault.message)]
    ours, theirs = vocabularies
    violations = []
    match = compare_vocabularies(ours, theirs)
    if not match.compatible:
        shown = ", ".join(f"id {index} is {first!r} / {second!r}" for index, first, second in match.disagreements)
        message = (
            f"its tokenizer disagrees with the student's (teacher / student): {shown}; use models of one tokenizer"
        )
        violations.append(_violation("teacher_model_path", message))
    elif config.top_k > match.shared_size:
        violations.append(
            _violation("top_k", f"{config.top_k}: the vocabulary has {match.shared_size} ids; use at most that many")
        )
    return violations


def _check_context(config: RunConfig, base: ModelFolder, teacher: ModelFolder) -> list[FieldViolation]:
    lengths = [folder.number("max_position_embeddings") for folder in (base, teacher)]
    context = min((length for length in lengths if length), default=0)
    if context and config.max_generation_tokens >= context:
        message = (
            f"{config.max_generation_tokens}: no room for a prompt in the models' context of {context} tokens; lower it"
        )
        return [_violation("max_generation_tokens", message)]
    return []


def _check_rows(config: RunConfig) -> list[FieldViolation]:
    both = bool(config.prompts_path and config.validation_prompts_path)
    limits = {"prompts_path": config.max_prompts, "validation_prompts_path": config.max_validation_prompts}
    violations = []
    for name, limit in limits.items():
        if not (path := getattr(config, name)):
            continue
        rows = list(scan_rows(Path(path), limit if both else sum(limits.values())))
        faults = [entry for entry in rows if isinstance(entry, str)]
        violations += [_violation(name, fault) for fault in faults[:FAULTS_SHOWN]]
        if len(faults) > FAULTS_SHOWN:
            violations.append(_violation(name, f"{path}: {len(faults) - FAULTS_SHOWN} more faulty lines"))
        if not faults and not both and len(rows) < 2:
            violations.append(_violation(name, f"{path}: 1 row can't be split; add rows or name a second file"))
        violations += _check_texts(config, name, [entry for entry in rows if isinstance(entry, Row)])
    return violations


def _check_texts(config: RunConfig, name: str, rows: list[Row]) -> Iterator[FieldViolation]:
    if not config.use_teacher_targets and name != "validation_prompts_path":
        lacking = next((row for row in rows if row.completion is None and not row.text), None)
        if lacking:
            message = f"{lacking.place}: has no completion to learn, which use_teacher_targets false needs"
            yield _violation(name, message)
    # A token is at least a byte long, so only rows longer than that can be too long.
    long = [row for row in rows if len(row.prompt.encode()) > config.max_prompt_tokens]
    file = Path(config.base_model_path) / "tokenizer.json"
    if not long or not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as fault:  # noqa: BLE001 - the library raises nothing more special for a broken file
        yield _violation(
            "base_model_path", f"{file}: {' '.join(str(fault).split())}; copy the model's tokenizer files again"
        )
        return
    for row in long:
        count = len(tokenizer.encode(row.prompt, add_special_tokens=False).ids) // (1 if row.messages else 2)
        if count > config.max_prompt_tokens:
            message = f"{row.place}: {count} tokens; shorten the prompt or raise max_prompt_tokens"
            yield _violation("max_prompt_tokens", f"{config.max_prompt_tokens}: {message}")
            return


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(f"config.{name}", description)
