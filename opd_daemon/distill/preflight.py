"""Everything about a run that can be checked in a second, before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from opd_daemon.config import RunConfig, config_violations
from opd_daemon.distill.adapter import adapter_faults, lora_faults
from opd_daemon.distill.data import Row, TeacherReader, length_fault, load_tokenizer, scan_rows, tokenise
from opd_daemon.distill.optimizer_options import optimizer_faults
from opd_daemon.errors import FieldViolation, OpdError
from opd_daemon.models.folder import UNLIMITED_CONTEXT, ModelFolder, read_folder
from opd_daemon.paths import AllowedRoots
from opd_daemon.vocabulary import compare_vocabularies, load_vocabulary

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainerInfo

# Most tokens that the student reads and that the teacher reads.
Contexts = tuple[int, int]
FAULTS_SHOWN = 5
# What chat templates put around a conversation, a default system prompt included, and around each of its turns.
TEMPLATE_TOKENS, TURN_TOKENS = 64, 8


def check_run(config: RunConfig, trainer: TrainerInfo | None, roots: AllowedRoots) -> list[FieldViolation]:
    """One violation per fault of a run: folders, adapter, rows, options, output and tokenizers. Empty: it may start.

    Without a trainer, whose name was wrong, its options are not checked. Nothing outside the roots is touched.
    """
    refused = dict(roots.faults_of_run(config.model_dump(mode="json")))
    violations = [*_check_method(config, trainer)]
    violations += [_violation(name, f"{getattr(config, name)}: {fault}") for name, fault in refused.items()]
    violations += [] if "output_adapter_path" in refused else _check_output(config)
    folders: dict[str, ModelFolder] = {}
    for name in ("base_model_path", "teacher_model_path"):
        if name in refused:
            continue
        try:
            folders[name] = read_folder(Path(getattr(config, name)))
        except OpdError as fault:
            violations.append(_violation(name, fault.message))
    base, teacher = folders.get("base_model_path"), folders.get("teacher_model_path")
    if base and config.student_adapter_path and "student_adapter_path" not in refused:
        faults = adapter_faults(Path(config.student_adapter_path), base.tensors, base.bits)
        violations += [_violation("student_adapter_path", fault) for fault in faults]
    elif base and not config.student_adapter_path:
        violations += [_violation(f"lora.{name}", fault) for name, fault in lora_faults(config.lora, base)]
    contexts = None
    if base and (teacher or config.teacher_template != "teacher"):
        contexts = UNLIMITED_CONTEXT, UNLIMITED_CONTEXT
    if base and teacher:
        violations += _check_tokenizers(config, base, teacher)
        no_room = _check_context(config, base, teacher)
        violations += no_room
        if not no_room:
            contexts = min(base.max_context, teacher.max_context), teacher.max_context
    if refused.keys() & {"prompts_path", "validation_prompts_path"}:
        return violations
    violations += _check_rows(config, contexts, needs_completions=_sources(config, trainer).get("data", 0.0) > 0)
    return violations


def _check_method(config: RunConfig, trainer: TrainerInfo | None) -> Iterator[FieldViolation]:
    """Whether trainer, optimizer and evaluation go with their options."""
    if trainer:
        faults = _check_options(config, trainer)
        yield from faults
        if not faults:
            options = trainer.options.model_validate(config.trainer_options)
            yield from (_violation(name, fault) for name, fault in trainer.faults(config, options))
        if config.precompute and not config.use_cache:
            yield _violation("precompute", "keeps the teacher's answers in the cache: set use_cache true")
        if config.precompute and _sources(config, trainer).get("student"):
            message = f"trainer {trainer.name} trains on what the student will say, which can't be scored beforehand"
            yield _violation("precompute", f"{message}; set it false, or use an off-policy trainer")
    yield from optimizer_faults(config)
    if config.eval_tasks and find_spec("lm_eval") is None:
        yield _violation("eval_tasks", f"{config.eval_tasks}: tasks need the package lm-eval; run: pip install lm-eval")


def _sources(config: RunConfig, trainer: TrainerInfo | None) -> Mapping[str, float]:
    """Who writes the completions; nobody where the trainer or its options are wrong."""
    try:
        return trainer.sources(config, trainer.options.model_validate(config.trainer_options)) if trainer else {}
    except ValidationError:
        return {}


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
    context = min(base.max_context, teacher.max_context)
    if config.max_generation_tokens >= context:
        message = (
            f"{config.max_generation_tokens}: no room for a prompt in the models' context of {context} tokens; lower it"
        )
        return [_violation("max_generation_tokens", message)]
    return []


def _check_rows(config: RunConfig, contexts: Contexts | None, *, needs_completions: bool) -> list[FieldViolation]:
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
        sound = [entry for entry in rows if isinstance(entry, Row)]
        if needs_completions and name != "validation_prompts_path":
            violations += _check_completions(name, sound)
        violations += _check_texts(config, name, sound, contexts)
    return violations


def _check_completions(name: str, rows: list[Row]) -> Iterator[FieldViolation]:
    lacking = next((row for row in rows if row.completion is None and not row.text), None)
    if lacking:
        cure = "give one in every row, or use a trainer or use_teacher_targets that doesn't need it"
        yield _violation(name, f"{lacking.place}: has no completion to learn; {cure}")


def _check_texts(config: RunConfig, name: str, rows: list[Row], contexts: Contexts | None) -> Iterator[FieldViolation]:
    """Whether each model can read the prompts, and has room to answer. Only rows that may be too long are tokenised.

    contexts: None where a model whose tokens count can't be read.
    """
    reader = TeacherReader(config.teacher_system_prompt)
    if fault := next(filter(None, map(reader.fault, rows)), ""):
        yield _violation(name, fault)
        return
    if not contexts:
        return
    room = min(config.max_prompt_tokens, min(contexts) - config.max_generation_tokens)
    long = [row for row in rows if _most_tokens(row, reader) > room]
    if long:
        yield from _check_lengths(config, name, long, contexts)


def _check_lengths(config: RunConfig, name: str, rows: list[Row], contexts: Contexts) -> Iterator[FieldViolation]:
    tokenizers = {}
    for field in ("base_model_path", *(["teacher_model_path"] if config.teacher_template == "teacher" else [])):
        file = Path(getattr(config, field)) / "tokenizer.json"
        if not file.is_file():
            return
        try:
            tokenizers[field] = load_tokenizer(file.parent)
        except Exception as fault:  # noqa: BLE001 - the libraries raise nothing more special for a broken file
            cure = "copy the model's tokenizer files again"
            yield _violation(field, f"{file}: {' '.join(str(fault).split())}; {cure}")
            return
    reader = TeacherReader(config.teacher_system_prompt, tokenizers.get("teacher_model_path"))
    for row in rows:
        try:
            found = length_fault(tokenise(row, 0, tokenizers["base_model_path"], (0,), reader), config, *contexts)
        except OpdError as fault:
            found = _violation(name, fault.message)
        if found:
            yield found
            return


def _most_tokens(row: Row, reader: TeacherReader) -> int:
    """More tokens than either model's prompt has, unless its chat template says more than is usual."""
    if not row.messages:
        return (len(row.text.encode()) + 1) // 2 + 1
    return TEMPLATE_TOKENS + max(
        sum(len(turn["content"].encode()) + TURN_TOKENS for turn in turns)
        for turns in (row.messages, reader.messages(row))
    )


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(f"config.{name}", description)
