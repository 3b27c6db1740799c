"""Exact resume with real processes: a worker killed again and again gives what an undisturbed one gives."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from opd_daemon.client import Client
from opd_daemon.types import RunState
from tests.distill.tiny_run import comparable
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for

KILLS = 2


@pytest.mark.parametrize(
    ("trainer", "trainer_options"), [("on_policy", {}), ("on_policy", {"staleness": 1}), ("offline", {})]
)
def test_a_run_whose_worker_is_killed_is_the_undisturbed_run(
    daemon: DaemonProcess,
    tiny_teacher: Path,
    tiny_student: Path,
    prompts: Path,
    trainer: str,
    trainer_options: dict[str, Any],
) -> None:
    values = configuration(
        tiny_teacher,
        tiny_student,
        prompts,
        trainer=trainer,
        trainer_options=trainer_options,
        num_steps=15,
        eval_every=4,
        checkpoint_every=3,
        max_eval_samples=2,
        lora={"rank": 4, "dropout": 0.1},
    )
    draw = random.Random(trainer)
    with daemon.client() as client:
        disturbed = _disturbed(client, daemon, {**values, "run_id": "disturbed"}, draw)
        client.prune_cache(0)  # so that the other one computes everything anew
        run, _ = client.create_run({**values, "run_id": "undisturbed"})
        finished = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert finished.state is RunState.SUCCEEDED, finished.error_message
        assert disturbed == _outcome(client, daemon, "undisturbed")


def _disturbed(client: Client, daemon: DaemonProcess, values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    run, _ = client.create_run(values)
    killed = 0
    while True:
        goal = draw.randint(2, 5) + 5 * killed
        run = wait_for(client, run.run_id, lambda run, goal=goal: run.state.resting or run.step >= goal)  # type: ignore[misc]
        if run.state is RunState.SUCCEEDED:
            assert killed == KILLS
            return _outcome(client, daemon, run.run_id)
        if killed < KILLS:
            time.sleep(draw.random() * 0.2)
            for worker in daemon.workers():
                worker.kill()
            killed += 1
            run = wait_for(client, run.run_id, lambda run: run.state.resting)
            assert run.state is RunState.INTERRUPTED
            client.resume(run.run_id)
        else:
            wait_for(client, run.run_id, lambda run: run.state.resting)


def _outcome(client: Client, daemon: DaemonProcess, run_id: str) -> dict[str, Any]:
    steps, evaluations, *_ = client.metrics(run_id)
    final = daemon.home.run(run_id).checkpoints / "final"
    return {
        "steps": [comparable(row) for row in steps],
        "evaluations": [comparable(row) for row in evaluations],
        "checkpoints": [entry.step for entry in client.checkpoints(run_id)],
        "adapter": (final / "adapters.safetensors").read_bytes(),
    }
