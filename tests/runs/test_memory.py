"""A worker whose memory ran out is followed by one with smaller micro-batches; other deaths are not taken for that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opd_daemon.errors import Reason
from opd_daemon.runs import memory
from opd_daemon.runs.memory import kills_for_memory, memory_ended
from opd_daemon.types import EventKind, RunState
from tests.asynchronous import asynchronous
from tests.runs.daemon import Daemon, Stage, metrics, with_run, write_checkpoint

S = RunState
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory to one process")


@pytest.mark.parametrize(
    ("code", "words", "limited", "kills", "memory_was_it"),
    [
        (-signal.SIGKILL, "", False, 0, False),
        (-signal.SIGKILL, "", False, 1, True),
        (-signal.SIGKILL, "out of memory, said someone else", False, 0, False),
        (-signal.SIGABRT, "what():  std::bad_alloc", False, 0, True),
        (-signal.SIGABRT, "libc++abi: [METAL] Command buffer execution failed: Insufficient Memory", False, 0, True),
        (-signal.SIGABRT, "assertion failed", False, 0, False),
        (-signal.SIGSEGV, "", False, 0, False),
        (1, "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.", False, 0, True),
        (1, "RuntimeError: [malloc] Unable to allocate 77 bytes.", False, 0, True),
        (1, "ValueError: no", False, 0, False),
        (0, "out of memory", False, 0, False),
    ],
)
def test_what_a_worker_died_of(code: int, words: str, limited: bool, kills: int, memory_was_it: bool) -> None:
    assert memory_ended(code, words, limited=limited, kills=kills) is memory_was_it


@linux_only
def test_a_segmentation_fault_under_a_limit_is_a_refused_allocation() -> None:
    assert memory_ended(-signal.SIGSEGV, "", limited=True, kills=0)


@pytest.mark.parametrize(
    ("groups", "file", "content"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\noom 3\noom_kill 2\n"),
        ("9:cpu:/\n4:memory:/a\n0::/\n", "memory/a/memory.oom_control", "under_oom 0\noom_kill 2\n"),
    ],
)
def test_the_kernels_kills_are_read_from_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, file: str, content: str
) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "SYSTEM_COUNTERS", tmp_path / "vmstat")
    assert kills_for_memory() == 0
    (tmp_path / "vmstat").write_text("pgfault 9\noom_kill 7\n")
    assert kills_for_memory() == 7
    (tmp_path / "groups").write_text(groups)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content)
    assert kills_for_memory() == 2


@linux_only
def test_a_limited_process_is_refused_what_goes_beyond() -> None:
    program = (
        "from opd_daemon.memory_limit import lift_memory_limit, limit_process_memory\n"
        "limit_process_memory(200 << 20)\n"
        "bytearray(50 << 20)\n"
        "try:\n    bytearray(400 << 20)\nexcept MemoryError:\n    print('refused')\n"
        "lift_memory_limit()\nbytearray(400 << 20)\nprint('granted')"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "refused\ngranted\n"


async def run_out(daemon: Daemon, run_id: str) -> None:
    """The worker says that its memory ran out, and goes."""
    await daemon.runs.finish(run_id, S.INTERRUPTED, error_reason=Reason.OUT_OF_MEMORY)
    (worker,) = await daemon.events.read(lambda store: store.workers())
    os.killpg(worker.pid, signal.SIGTERM)


async def said(daemon: Daemon, run_id: str) -> list[str]:
    events, _ = await daemon.events.read(lambda store: store.events_after(0, run_id))
    return [event.payload["text"] for event in events if event.kind is EventKind.LOG]


@asynchronous
async def test_memory_that_runs_out_halves_the_micro_batches_from_the_last_checkpoint(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        run_id = await daemon.start(batch_size=8)
        path = write_checkpoint(daemon, run_id, 2)
        await daemon.runs.report(run_id, *(with_run(metrics(step), run_id) for step in (1, 2, 3)))
        await run_out(daemon, run_id)
        await daemon.worker_says(run_id, "ready", times=2)
        run, resume_path = await daemon.runs.assignment(run_id)
        assert (run.state, run.memory_halvings, run.step, run.attempt) == (S.LOADING, 1, 2, 0)
        assert resume_path == str(path)
        assert [row["step"] for row in (await daemon.runs.metrics(run_id))[0]] == [1, 2]
        await daemon.runs.running(run_id)
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        assert await daemon.states(run_id) == [
            "PENDING", "PLANNING", "LOADING", "RUNNING", "LOADING", "RUNNING", "SUCCEEDED",
        ]  # fmt: skip
        assert "memory ran out: going on from step 2 with micro-batches of 4" in await said(daemon, run_id)


@asynchronous
async def test_memory_that_runs_out_again_and_again_fails_the_run_with_advice(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="bad_alloc").daemon() as daemon:
        run_id = await daemon.create(batch_size=32)
        run = await daemon.reach(run_id, S.FAILED)
        assert (run.error_reason, run.memory_halvings) == ("OUT_OF_MEMORY", 3)
        assert "micro-batches of 4 sequences; use backward 'layerwise'" in run.error_message
        sizes = [text.rpartition(" ")[2] for text in await said(daemon, run_id) if "memory ran out" in text]
        assert sizes == ["16", "8", "4"]


@asynchronous
async def test_micro_batches_of_one_can_not_be_halved(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="bad_alloc").daemon() as daemon:
        run = await daemon.reach(await daemon.create(batch_size=2), S.FAILED)
        assert (run.error_reason, run.memory_halvings) == ("OUT_OF_MEMORY", 1)
        assert "micro-batches of one sequence" in run.error_message


@asynchronous
async def test_where_one_sequence_is_trained_on_fewer_may_be_sampled_at_once(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="bad_alloc", on_policy=True).daemon() as daemon:
        run = await daemon.reach(await daemon.create(batch_size=1, gradient_accumulation_steps=4), S.FAILED)
        assert (run.error_reason, run.memory_halvings) == ("OUT_OF_MEMORY", 2)


@asynchronous
async def test_halvings_outlive_the_daemon_and_a_resume(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        run_id = await daemon.start(batch_size=8)
        await run_out(daemon, run_id)
        await daemon.worker_says(run_id, "ready", times=2)
    async with stage.daemon() as daemon:
        assert (await daemon.runs.get(run_id)).state is S.INTERRUPTED
        await daemon.runs.resume(run_id)
        await daemon.worker_says(run_id, "ready", times=3)
        assert (await daemon.runs.assignment(run_id))[0].memory_halvings == 1


@asynchronous
async def test_a_run_that_is_to_stop_does_not_start_again_for_memory(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start(batch_size=8)
        await daemon.runs.stop(run_id)
        await run_out(daemon, run_id)
        run = await daemon.reach(run_id, S.INTERRUPTED)
        assert (run.error_reason, run.memory_halvings) == ("OUT_OF_MEMORY", 0)
