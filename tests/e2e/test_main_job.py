"""The main job with real processes: two watchers, a stop, a resume, a finish; and what happens when processes die."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import psutil
import pytest

from opd_daemon.client import Client
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Event, EventKind, Run, RunState
from tests.e2e.conftest import DaemonProcess

WAIT_SECONDS = 120.0


def configuration(teacher: Path, student: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_id": "main_job",
        "trainer": "on_policy",
        "teacher_model_path": str(teacher),
        "base_model_path": str(student),
        "prompts_path": str(prompts),
        "num_steps": 6,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
        "top_k": 16,
        "max_generation_tokens": 8,
        "eval_every": 3,
        "checkpoint_every": 2,
        "lora": {"rank": 4},
    }
    return {**values, **changes}


def wait_for(client: Client, run_id: str, condition: Callable[[Run], bool]) -> Run:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        run, _ = client.run(run_id)
        if condition(run):
            return run
        assert time.monotonic() < deadline, f"still {run.state} at step {run.step}: {run.error_message}"
        time.sleep(0.05)


def watch_until_end(client: Client, run_id: str, events: list[Event], after: int, reopen_every: int = 0) -> None:
    """Collect events up to the SUCCEEDED one; with `reopen_every`, drop the watch after so many and resume it."""
    cursor, seen = after, 0
    while True:
        for item in client.watch(after_revision=cursor, run_id=run_id):
            if not isinstance(item, Event):
                continue
            events.append(item)
            cursor, seen = item.revision, seen + 1
            if item.payload.get("state") == RunState.SUCCEEDED:
                return
            if reopen_every and seen % reopen_every == 0:
                break


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_run_is_watched_stopped_resumed_and_finished(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path, tmp_path: Path
) -> None:
    base_before = digest(tiny_student)
    output = tmp_path / "adapter"
    with daemon.client() as client:
        values = configuration(
            tiny_teacher, tiny_student, prompts, num_steps=40, output_adapter_path=str(output), checkpoint_every=10
        )
        run, revision = client.create_run(values, request_id="once")
        again, _ = client.create_run(values, request_id="once")
        assert again.run_id == run.run_id

        steady: list[Event] = []
        dropping: list[Event] = []
        watchers = [
            threading.Thread(target=watch_until_end, args=(daemon.client(), run.run_id, steady, revision)),
            threading.Thread(target=watch_until_end, args=(daemon.client(), run.run_id, dropping, revision, 3)),
        ]
        for watcher in watchers:
            watcher.start()

        wait_for(client, run.run_id, lambda run: run.step >= 2)
        client.stop(run.run_id)
        stopped = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert stopped.state is RunState.STOPPED
        assert stopped.checkpoint_step == stopped.step > 0
        with pytest.raises(OpdError) as refusal:
            client.stop(run.run_id)
        assert refusal.value.reason is Reason.RUN_STATE_CONFLICT

        client.resume(run.run_id)
        with pytest.raises(OpdError) as refusal:
            client.resume(run.run_id)
        assert refusal.value.reason is Reason.RUN_STATE_CONFLICT
        finished = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert finished.state is RunState.SUCCEEDED, finished.error_message
        assert finished.step == 40
        for watcher in watchers:
            watcher.join(WAIT_SECONDS)

        assert [event.revision for event in steady] == [event.revision for event in dropping]
        assert steady == dropping
        revisions = [event.revision for event in steady]
        assert revisions == sorted(set(revisions))
        steps = [event.payload["step"] for event in steady if event.kind is EventKind.METRICS]
        assert steps == list(range(1, 41))

        evaluations = [event.payload for event in steady if event.kind is EventKind.EVALUATION]
        assert evaluations[0]["step"] == 0
        assert evaluations[0]["exact"]
        assert evaluations[-1]["reverse_kl"] < evaluations[0]["reverse_kl"]

    assert digest(tiny_student) == base_before
    prompt = mx.array([[5, 6, 7, 8]])
    base, _ = mlx_lm.load(str(tiny_student))
    adapted, _ = mlx_lm.load(str(tiny_student), adapter_path=str(output))
    assert mx.abs(base(prompt) - adapted(prompt)).max().item() > 1e-3


def test_killed_worker_leaves_the_teacher_and_an_interrupted_run_that_resumes(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path
) -> None:
    with daemon.client() as client:
        values = configuration(tiny_teacher, tiny_student, prompts, num_steps=60)
        run, _ = client.create_run(values)
        wait_for(client, run.run_id, lambda run: (run.checkpoint_step or 0) >= 2)
        (worker,) = daemon.workers()
        worker.kill()
        interrupted = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert interrupted.state is RunState.INTERRUPTED
        assert client.teacher()[0] == "READY"
        client.resume(run.run_id)
        finished = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert finished.state is RunState.SUCCEEDED, finished.error_message
        steps = [row["step"] for row in client.metrics(run.run_id)[0]]
        assert steps == list(range(1, 61))


def test_killed_daemon_leaves_no_process_and_finds_its_runs_again(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path
) -> None:
    with daemon.client() as client:
        run, _ = client.create_run(configuration(tiny_teacher, tiny_student, prompts, num_steps=2000))
        wait_for(client, run.run_id, lambda run: run.step >= 2)
    (worker,) = daemon.workers()
    daemon.kill()
    assert psutil.wait_procs([worker], timeout=20)[1] == []
    daemon.start()
    with daemon.client() as client:
        found, _ = client.run(run.run_id)
        assert found.state is RunState.INTERRUPTED
        client.resume(run.run_id)
        wait_for(client, run.run_id, lambda run: run.state is RunState.RUNNING and run.step > found.step)
        client.stop(run.run_id)
        assert wait_for(client, run.run_id, lambda run: run.state.resting).state is RunState.STOPPED


def test_a_run_waits_for_a_load_under_way_and_then_keeps_its_teacher(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path
) -> None:
    with daemon.client() as client:
        load = client.load_teacher(str(tiny_student))
        next(load)
        run, _ = client.create_run(configuration(tiny_teacher, tiny_student, prompts, num_steps=60))
        wait_for(client, run.run_id, lambda run: run.step >= 1)
        with pytest.raises(OpdError) as refusal:
            client.unload_teacher()
        assert refusal.value.reason is Reason.TEACHER_IN_USE
        client.stop(run.run_id)
        stopped = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert stopped.state is RunState.STOPPED, stopped.error_message
        client.unload_teacher()
