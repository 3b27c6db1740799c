"""A worker that is really refused memory: the run goes on in less of it, and trains the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from opd_daemon.client import Client
from opd_daemon.types import Event, EventKind, Run, RunState
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for
from tests.tiny import write_tiny_qwen2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory to one process")


def own_bytes(daemon: DaemonProcess) -> int:
    """The memory of a worker that a limit counts: its data, heap and stacks."""
    (worker,) = daemon.workers()
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


def losses(client: Client, run: Run) -> list[float]:
    return [row["loss"] for row in client.metrics(run.run_id)[0]]


def test_a_refused_allocation_halves_the_micro_batches_and_changes_no_loss(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    # Long sequences and many heads: nearly all of a step's memory is attention, and goes with the micro-batch.
    student = write_tiny_qwen2(tmp_path / "student", seed=2, heads=8, context=1024)
    teacher = write_tiny_qwen2(tmp_path / "teacher", seed=1, context=1024)
    words = "The tide comes in twice a day, and twice a day it leaves the harbour to the gulls. " * 8
    rows = [json.dumps({"prompt": f"{number}: {words}", "completion": "Plums and pears."}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = {"trainer": "dataset", "num_steps": 2, "batch_size": 16, "gradient_accumulation_steps": 1}
    sparing = {"backward": "plain", "eval_every": 2, "max_eval_samples": 0, "max_validation_prompts": 1}
    values = configuration(teacher, student, tmp_path / "rows.jsonl", run_id="", **settings, **sparing)
    with daemon.client() as client:
        run, _ = client.create_run(values)
        wait_for(client, run.run_id, lambda run: run.state is RunState.RUNNING)
        idle = own_bytes(daemon)
        unlimited = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert unlimited.state is RunState.SUCCEEDED, unlimited.error_message
        step_bytes = client.metrics(run.run_id)[0][-1]["student_peak_bytes"]

        limit = idle + 2 * step_bytes // 3
        # Forced, as a plan may know that it will not fit.
        run, revision = client.create_run({**values, "worker_memory_limit_bytes": limit}, force=True)
        limited = wait_for(client, run.run_id, lambda run: run.state.resting)
        assert limited.state is RunState.SUCCEEDED, limited.error_message
        assert limited.memory_halvings in (1, 2)
        assert limited.attempt == 0
        assert len(losses(client, limited)) == 2
        assert losses(client, limited) == pytest.approx(losses(client, unlimited), rel=1e-5)
        micro_batches = [row["micro_batches"] for row in client.metrics(run.run_id)[0]]
        assert micro_batches == [2**limited.memory_halvings] * 2
        assert "memory ran out: going on from step 0 with micro-batches of 8" in said(client, run, revision)


def said(client: Client, run: Run, after: int) -> list[str]:
    texts = []
    for item in client.watch(after_revision=after, run_id=run.run_id):
        if isinstance(item, Event):
            if item.payload.get("state") == RunState.SUCCEEDED:
                return texts
            if item.kind is EventKind.LOG:
                texts.append(item.payload["text"])
    raise AssertionError("the watch ended before the run")
