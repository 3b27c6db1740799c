"""Checkpoints appear whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opd_daemon.distill import files
from opd_daemon.distill.checkpoints import (
    OPTIMIZER,
    STATE,
    Checkpoints,
    RunProgress,
    copy_adapter,
    latest,
    read_progress,
    step_folders,
)
from opd_daemon.errors import OpdError, Reason

EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def save(folder: Path) -> None:
    (folder / "adapters.safetensors").write_bytes(EMPTY_SAFETENSORS)
    (folder / OPTIMIZER).write_bytes(EMPTY_SAFETENSORS)
    (folder / "adapter_config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_last_ones_are_kept_and_best_and_final_always(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save_named("best", save)
    checkpoints.save_named("final", save)
    for step in (5, 10, 15, 1_000_000):
        checkpoints.save_step(RunProgress(step=step), save)
    assert names(tmp_path) == ["best", "final", "step_000015", "step_1000000"]
    assert latest(tmp_path) == tmp_path / "step_1000000"


def test_progress_is_read_back_as_it_was(tmp_path: Path) -> None:
    progress = RunProgress(step=3, cursor=24, seed=9, best_kl=0.25, best_step=2, seconds_elapsed=1.5)
    path = Checkpoints(tmp_path, 1).save_step(progress, save)
    assert read_progress(path) == progress


@pytest.mark.parametrize("file", [STATE, OPTIMIZER, "adapters.safetensors", "adapter_config.json"])
def test_half_a_checkpoint_is_never_resumed_from(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    whole = checkpoints.save_step(RunProgress(step=1), save)
    half = checkpoints.save_step(RunProgress(step=2), save)
    (half / file).unlink()
    assert latest(tmp_path) == whole
    with pytest.raises(OpdError) as caught:
        read_progress(half)
    assert caught.value.reason == Reason.CHECKPOINT_NOT_FOUND


def test_nothing_to_resume_from_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "never") is None


def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save_step(RunProgress(step=1), save)
    before = names(tmp_path)

    def fail(folder: Path) -> None:
        save(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OpdError) as caught:
        checkpoints.save_step(RunProgress(step=2), fail)
    assert caught.value.reason == Reason.DISK_FULL
    assert "step_000002: no space left" in caught.value.message
    assert names(tmp_path) == before


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """A limit on file sizes makes the kernel itself refuse the write."""
    code = """
import resource, sys
from pathlib import Path
from opd_daemon.distill.files import write_file
from opd_daemon.errors import OpdError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file(Path(sys.argv[1]) / "new", b"x" * 5000)
except OpdError as error:
    print(error.reason, [entry.name for entry in Path(sys.argv[1]).iterdir()])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "DISK_FULL []"


def test_a_crash_between_two_renames_is_repaired(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 1).save_named("best", save)
    (tmp_path / "best").rename(tmp_path / ".best.old")
    (tmp_path / ".best.123").mkdir()
    Checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["best"]


def test_death_while_an_old_checkpoint_is_deleted_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException): ...

    def dies(path: Path, **_: object) -> None:
        if path.exists():
            (path / STATE).unlink()
            raise Death

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save_step(RunProgress(step=1), save)
    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(Death):
        checkpoints.save_step(RunProgress(step=2), save)
    with pytest.raises(Death):
        checkpoints.forget_after(0)
    monkeypatch.undo()
    assert step_folders(tmp_path) == []
    Checkpoints(tmp_path, keep_last=1)
    assert names(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    first = RunProgress(step=4, cursor=1)
    checkpoints.save_step(first, save)
    path = checkpoints.save_step(replace(first, cursor=2), save)
    assert read_progress(path).cursor == 2
    assert names(tmp_path) == ["step_000004"]


def test_copying_the_adapter_leaves_other_files_alone(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path / "run", 1).save_step(RunProgress(step=1), save)
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    copy_adapter(path, target)
    assert names(target) == ["adapter_config.json", "adapters.safetensors", "notes.txt"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdError, match="can't be written") as caught:
        files.write_file(tmp_path / "file" / "inside", b"")
    assert caught.value.reason == Reason.INVALID_REQUEST


def test_state_is_plain_json(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 1).save_step(RunProgress(step=1), save)
    assert json.loads((path / STATE).read_text())["step"] == 1
