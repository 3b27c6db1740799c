"""A run that is ended and taken up again, however often and wherever, gives what it would have given uninterrupted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from opd_daemon.distill.checkpoints import latest, read_progress
from opd_daemon.distill.rollouts import read_log
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import CachedScores, EventKind, ScoreRequest
from tests.distill import tiny_run
from tests.distill.local_teacher import LocalTeacher
from tests.distill.tiny_run import Told, folders_of, go, prepare, result

MOST_ATTEMPTS = 12
# A sample: all of them take minutes.
CRASH_POINTS = 5


class Killed(BaseException):
    """Ends a run where `kill -9` would have: no handler of errors sees it."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> Iterator[list[str]]:
    """Die instead of the operation-th call that changes files for good; yields the calls that were made."""
    made: list[str] = []

    def fatal(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if len(made) == operation:
                raise Killed
            made.append(name)
            return original(*arguments, **options)

        patched.setattr(owner, name, call)

    with monkeypatch.context() as patched:
        fatal(Path, "rename")
        fatal(Path, "replace")
        fatal(os, "fsync")
        fatal(tiny_run.run_trainer.__globals__["Journal"], "_write")
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[str], Path]:
    numbers = count()
    return lambda name: tmp_path / f"{name}{next(numbers)}"


@pytest.mark.parametrize("trainer", ["on_policy", "offline"])
def test_death_at_any_change_of_a_file_changes_nothing(
    tiny_teacher: Path,
    tiny_student: Path,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    trainer: str,
) -> None:
    teacher = LocalTeacher(tiny_teacher)
    settings = {"trainer": trainer, "early_stop_patience": 2}
    whole = prepare(folders("whole"), tiny_teacher, tiny_student, **settings)
    with killed_at(monkeypatch, -1) as operations:
        assert go(whole, Told(), teacher=teacher)
    expected = result(whole)
    chosen = random.Random(trainer).sample(range(len(operations)), CRASH_POINTS)
    for operation in sorted(chosen):
        broken = prepare(folders("broken"), tiny_teacher, tiny_student, **settings)
        with killed_at(monkeypatch, operation), pytest.raises(Killed):
            go(broken, Told(), teacher=teacher)
        assert go(broken, Told(), teacher=teacher)
        found = result(broken)
        for name, value in expected.items():
            assert found[name] == value, (name, operation, operations[operation])


@pytest.mark.parametrize(("trainer", "optimizer"), [("on_policy", "adamw"), ("offline", "adafactor")])
def test_killed_at_random_moments_it_still_gives_the_same(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path], trainer: str, optimizer: str
) -> None:
    settings = {"trainer": trainer, "optimizer": optimizer, "num_steps": 8}
    whole = prepare(folders("whole"), tiny_teacher, tiny_student, **settings)
    assert go(whole, Told())
    broken = prepare(folders("broken"), tiny_teacher, tiny_student, **settings)
    draw = random.Random(f"{trainer} {optimizer}")
    codes = [_worker(broken, draw.randint(3, 12)) for _ in range(2)]
    assert -signal.SIGKILL in codes
    while (codes := [*codes, _worker(broken, None)])[-1]:
        assert len(codes) < MOST_ATTEMPTS
    found, expected = result(broken), result(whole)
    for name, value in expected.items():
        assert found[name] == value, name


def test_a_stop_in_the_middle_of_an_evaluation_makes_it_again(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path]
) -> None:
    teacher = LocalTeacher(tiny_teacher)
    whole = prepare(folders("whole"), tiny_teacher, tiny_student)
    assert go(whole, Told(), teacher=teacher)
    broken = prepare(folders("broken"), tiny_teacher, tiny_student)
    stopping = False

    class Impatient(LocalTeacher):
        """Leaves the call in which the evaluation after step 3 asks about the student's samples."""

        def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
            nonlocal stopping
            if len(read_log(folders_of(broken).train_metrics)) == 3:
                stopping = True
                raise OpdError(Reason.CANCELLED, "left the call to the teacher, as the run was asked to stop")
            return super().score(requests)

    assert not go(broken, Told(), teacher=Impatient(tiny_teacher), should_stop=lambda: stopping)
    checkpoint = latest(folders_of(broken).checkpoints)
    assert checkpoint is not None
    assert read_progress(checkpoint).step == 3
    assert [row["step"] for row in read_log(folders_of(broken).eval_metrics)] == [0]
    assert go(broken, Told(), teacher=teacher)
    assert result(broken) == result(whole)


def test_patience_ends_a_run_that_no_longer_improves(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path]
) -> None:
    teacher = LocalTeacher(tiny_teacher)
    settings = {"eval_every": 1, "checkpoint_every": 1, "early_stop_patience": 2, "learning_rate": 0.5, "num_steps": 9}
    folder = prepare(folders("impatient"), tiny_teacher, tiny_student, **settings)
    told = Told()
    assert go(folder, told, teacher=teacher)
    evaluations = told.of(EventKind.EVALUATION)
    last, best = evaluations[-1]["step"], max(row["step"] for row in evaluations if row["is_best"])
    assert last == best + 2 < 9
    ended, copied = [row["text"] for row in told.of(EventKind.LOG)[-2:]]
    assert ended.startswith(f"ended early after step {last}: 2 evaluations without")
    assert f"gets the best adapter, of step {best} with a validation KL of" in copied
    final = [row for row in told.of(EventKind.CHECKPOINT) if row["is_final"]]
    assert [row["step"] for row in final] == [last]
    assert [row["step"] for row in told.of(EventKind.SAMPLE) if row["step"]].count(last) >= 3
    expected, again = result(folder), Told()
    output, newest, kept = expected["adapters"]
    assert output == kept != newest
    # The worker died before it could say that it was done: nothing is left to do but to say so.
    assert go(folder, again, teacher=teacher)
    assert again.of(EventKind.METRICS) == []
    assert result(folder) == expected


@pytest.mark.parametrize("best_only", [True, False])
def test_the_output_path_gets_the_best_adapter_where_it_is_asked_for(
    tiny_teacher: Path, folders: Callable[[str], Path], *, best_only: bool
) -> None:
    # The teacher as its own student can only be spoilt by other texts, and more so with every step.
    texts = {"trainer": "offline", "use_teacher_targets": False, "kl_weight": 0.0, "ce_weight": 1.0}
    settings = {"eval_every": 1, "save_best_only": best_only, "warmup_steps": 3, "num_steps": 3, **texts}
    folder = prepare(folders("spoilt"), tiny_teacher, tiny_teacher, **settings)
    told = Told()
    assert go(folder, told)
    output, final, best = result(folder)["adapters"]
    assert best != final
    assert output == (best if best_only else final)
    assert any("not the final one of step 3" in row["text"] for row in told.of(EventKind.LOG)) == best_only


def test_memory_running_short_is_told_once(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.distill.loop.memory_pressure", lambda: "little memory is free")
    told = Told()
    go(prepare(folders("short"), tiny_teacher, tiny_student, num_steps=3), told)
    assert [row["level"] for row in told.of(EventKind.LOG) if row["text"] == "little memory is free"] == ["warning"]


def test_halved_micro_batches_give_the_same_losses(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path]
) -> None:
    teacher = LocalTeacher(tiny_teacher)
    settings = {"trainer": "offline", "lora": {"rank": 4}, "num_steps": 5}
    whole = prepare(folders("whole"), tiny_teacher, tiny_student, **settings)
    assert go(whole, Told(), teacher=teacher)
    halved = prepare(folders("halved"), tiny_teacher, tiny_student, **settings)
    left = iter(range(10))
    assert not go(halved, Told(), teacher=teacher, should_stop=lambda: next(left, None) is None)
    assert go(halved, Told(), teacher=teacher, memory_halvings=1)
    found, expected = result(halved)["steps"], result(whole)["steps"]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-3)
    assert found[-1]["micro_batches"] == 2 * expected[-1]["micro_batches"]


def test_a_checkpoint_whose_event_was_lost_is_told_again(
    tiny_teacher: Path, tiny_student: Path, folders: Callable[[str], Path]
) -> None:
    teacher = LocalTeacher(tiny_teacher)
    folder = prepare(folders("run"), tiny_teacher, tiny_student)
    left = iter(range(10))
    go(folder, Told(), teacher=teacher, should_stop=lambda: next(left, None) is None)
    checkpoint = latest(folders_of(folder).checkpoints)
    assert checkpoint is not None
    step = read_progress(checkpoint).step
    later = checkpoint.with_name("step_000006")
    shutil.copytree(checkpoint, later)
    (later / "adapters.safetensors").write_bytes(b"cut off")
    told = Told()
    assert go(folder, told, teacher=teacher)
    first = told.of(EventKind.CHECKPOINT)[0]
    assert (first["step"], first["path"]) == (step, str(checkpoint))
    assert read_progress(later).step == 6  # the broken one gave way


def _worker(folder: Path, lines: int | None) -> int:
    """Do the run in a process of its own; kill it some way behind so many reports. Returns its exit code."""
    command = [sys.executable, str(Path(tiny_run.__file__)), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for number, _ in enumerate(process.stdout):
            if number == lines:
                process.send_signal(signal.SIGKILL)
                break
        errors = process.stderr.read()
    assert process.returncode in {0, -signal.SIGKILL}, errors
    return process.returncode
