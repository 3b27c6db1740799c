"""Regimes that need a real daemon: a teacher that leaves once it has said all, or scores beside the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_daemon.client import Client
from opd_daemon.types import Event, EventKind, RunState, TeacherState
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for, watch_until_end


def finish(client: Client, run_id: str) -> None:
    run = wait_for(client, run_id, lambda run: run.state.resting)
    assert run.state is RunState.SUCCEEDED, run.error_message


def final_adapter(daemon: DaemonProcess, run_id: str) -> bytes:
    return (daemon.home.run(run_id).checkpoints / "final" / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("trainer", ["offline", "sft"])
def test_the_teacher_is_gone_before_the_student_trains_on_its_answers(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path, trainer: str
) -> None:
    values = configuration(tiny_teacher, tiny_student, prompts, trainer=trainer, max_eval_samples=0)
    with daemon.client() as client:
        client.create_run({**values, "run_id": "ahead", "precompute": True})
        finish(client, "ahead")
        assert client.teacher()[0] is TeacherState.UNLOADED
        events: list[Event] = []
        watch_until_end(client, "ahead", events, after=0)
        said = [event.payload["text"] for event in events if event.kind is EventKind.LOG]
        assert "the teacher is unloaded; its cache answers from now on" in said
        client.create_run({**values, "run_id": "beside"})
        finish(client, "beside")
        assert final_adapter(daemon, "ahead") == final_adapter(daemon, "beside")


def test_the_teacher_scores_the_next_rollouts_while_the_student_trains(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, prompts: Path
) -> None:
    values = configuration(tiny_teacher, tiny_student, prompts, trainer_options={"staleness": 1})
    with daemon.client() as client:
        client.create_run({**values, "run_id": "overlapped"})
        finish(client, "overlapped")
        steps, *_ = client.metrics("overlapped")
        assert [row["staleness"] for row in steps] == [0, 1, 0, 1, 0, 1]
