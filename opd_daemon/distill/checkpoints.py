"""Checkpoints of a run: `step_000100/`, `best/` and `final/`, each a complete adapter folder that mlx-lm loads.

A step's checkpoint holds besides `optimizer.safetensors` and `state.json`, from which a run goes on exactly as it
would have. A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opd_daemon.distill.adapter import CARD, CONFIG, WEIGHTS, adapter_files
from opd_daemon.distill.files import remove_folder, write_file, write_folder
from opd_daemon.distill.model_card import is_card
from opd_daemon.distill.peft import PEFT_WEIGHTS
from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit
from opd_daemon.models.folder import read_header

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where a run stands after `step` updates.

    cursor: prompts used so far. seed: of the run; every random number is a function of it and the step.
    best_kl, best_step: lowest validation KL so far and its step; None before an update was evaluated.
    evaluated_step, validation_kl: the newest evaluation; None before the first. evaluations_since_best: how many in a
    row brought no improvement. skipped_steps: how many in a row gave no number. idle_steps: how many
    in a row had nothing to learn.
    """

    step: int = 0
    cursor: int = 0
    seed: int = 0
    best_kl: float | None = None
    best_step: int | None = None
    seconds_elapsed: float = 0.0
    evaluated_step: int | None = None
    validation_kl: float | None = None
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    idle_steps: int = 0


class Checkpoints:
    """The checkpoint folder of one run, for the one process that writes to it."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._repair()

    def save_step(self, progress: RunProgress, save: Callable[[Path], None]) -> Path:
        """Write the checkpoint of a step, then delete the oldest ones beyond `keep_last`.

        `save` writes adapter and optimizer. Raises DISK_FULL, leaving the checkpoints as they were.
        """
        path = self.folder / f"step_{progress.step:06d}"

        def fill(folder: Path) -> None:
            save(folder)
            write_file(folder / STATE, json.dumps(asdict(progress), indent=2).encode())

        write_folder(path, fill)
        hit("checkpoint.saved")
        for old in step_folders(self.folder)[: -self.keep_last]:
            remove_folder(old)
        return path

    def save_named(self, name: str, save: Callable[[Path], None]) -> Path:
        """Write `best/` or `final/`, replacing an earlier one whole."""
        hit("checkpoint.named")
        write_folder(self.folder / name, save)
        return self.folder / name

    def forget_after(self, step: int) -> None:
        """Delete checkpoints of later steps, broken ones too: a run that goes on from here makes them anew."""
        for path in step_folders(self.folder):
            if int(path.name.removeprefix("step_")) > step:
                remove_folder(path)

    def _repair(self) -> None:
        """Finish or undo what a crash left half done: an old folder whose successor never came returns."""
        if not self.folder.is_dir():
            return
        for entry in self.folder.glob(".*.old"):
            place = self.folder / entry.name.removeprefix(".").removesuffix(".old")
            if not place.exists():
                entry.rename(place)
        for entry in self.folder.glob(".*"):
            shutil.rmtree(entry, ignore_errors=True)


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders of steps in a run's folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := STEP_FOLDER.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest complete step checkpoint in a run's folder, None when there is none."""
    for path in reversed(step_folders(folder)):
        try:
            read_progress(path)
        except OpdError:
            continue
        return path
    return None


def read_progress(path: Path) -> RunProgress:
    """Where the run stood at a step's checkpoint.

    Raises:
        OpdError: CHECKPOINT_NOT_FOUND when the folder is no complete checkpoint.
    """
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        progress = replace(RunProgress(), **content)
        read_header(path / WEIGHTS)
        read_header(path / OPTIMIZER)
        (path / CONFIG).stat()
    except (OSError, ValueError, TypeError, OpdError) as fault:
        message = f"{path}: no complete checkpoint; resume from another one"
        raise OpdError(Reason.CHECKPOINT_NOT_FOUND, message, path=path) from fault
    return progress


def folder_bytes(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in path.iterdir())


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's files into a folder that may hold other things. Raises DISK_FULL.

    Another adapter's weights go, so that no reader takes them for these; a README of somebody's own stays.
    """
    files = adapter_files(source)
    if PEFT_WEIGHTS not in {path.name for path in files}:
        (target / PEFT_WEIGHTS).unlink(missing_ok=True)
    for path in files:
        if path.name != CARD or is_card(target / CARD) or not (target / CARD).exists():
            write_file(target / path.name, path.read_bytes())
            hit("adapter.copy")
