"""Whatever a worker does, the daemon answers, the run rests in a state that says why, and nothing grows."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from opd_daemon.client import Client
from opd_daemon.runs.stall import StallPolicy
from opd_daemon.runs.worker_log import LIMIT_BYTES
from opd_daemon.store import Store, WorkerRecord
from opd_daemon.types import Event, Run, RunState, ScoreRequest, ScoreWants
from tests.crash.stage import Daemon, run_values, until

SOAK = os.environ.get("OPD_SOAK") == "1"
FLOOD = 1_000_000 if SOAK else 1_500
GROWTH_BYTES = 60 << 20
PRINTED_SECONDS = 2.0

MakeDaemon = Callable[..., Daemon]


def create(client: Client, root: Path, kind: str) -> str:
    return client.create_run(run_values(root, session_id=kind))[0].run_id


def reach(client: Client, run_id: str, *states: RunState, seconds: float = 60.0) -> Run:
    until(lambda: client.run(run_id)[0].state in states, seconds, f"{run_id} in {states}")
    return client.run(run_id)[0]


def logged(client: Client, run_id: str) -> Iterator[str]:
    """Texts of the run's log events so far."""
    _, now = client.run(run_id)
    for item in client.watch(0):
        if isinstance(item, Event):
            if item.run_id == run_id and "text" in item.payload:
                yield item.payload["text"]
            if item.revision >= now:
                return


@pytest.mark.parametrize(("kind", "name"), [("segfault", "SIGSEGV"), ("killed", "SIGKILL")])
def test_a_worker_that_dies_leaves_a_run_that_says_so_and_resumes(
    daemon: Daemon, tmp_path: Path, kind: str, name: str
) -> None:
    daemon.start()
    with daemon.client() as client:
        run = reach(client, create(client, tmp_path, kind), RunState.INTERRUPTED)
        assert (run.error_reason, name in run.error_message) == ("WORKER_DIED", True)
        assert client.resume(run.run_id)[0].attempt == 1


@pytest.mark.parametrize("kind", ["hangs", "hangs.politely"])
def test_a_worker_that_hangs_is_told_of_and_ended_when_its_time_is_over(
    make_daemon: MakeDaemon, tmp_path: Path, kind: str
) -> None:
    daemon = make_daemon(stall=StallPolicy(warning=0.5, limit=1.5))
    daemon.start()
    with daemon.client() as client:
        run = reach(client, create(client, tmp_path, kind), RunState.INTERRUPTED)
        assert "no progress" in run.error_message
        assert run.state.resumable
        warnings = [text for text in logged(client, run.run_id) if text.startswith("no progress")]
        assert len(warnings) == 1
        assert f"opd stop {run.run_id}" in warnings[0]
    until(lambda: daemon.workers() == [], what="the worker has left")


def test_a_worker_that_makes_progress_is_never_said_to_stall(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(stall=StallPolicy(warning=8.0, limit=10.0))
    daemon.start()
    with daemon.client() as client:
        run_id = client.create_run(run_values(tmp_path, num_steps=40))[0].run_id
        reach(client, run_id, RunState.SUCCEEDED)
        assert not [text for text in logged(client, run_id) if "no progress" in text]


def test_a_flood_of_events_is_stored_whole_and_costs_the_daemon_no_memory(
    make_daemon: MakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = make_daemon()
    daemon.start()
    process, slowest = psutil.Process(daemon.pid), 0.0
    with daemon.client() as client:
        run_id = create(client, tmp_path, f"floods-{FLOOD}")
        reach(client, run_id, RunState.RUNNING)
        before, started = process.memory_info().rss, time.monotonic()
        while client.run(run_id)[0].state is RunState.RUNNING:
            asked = time.monotonic()
            client.run(run_id)
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.05)
        took, grown = time.monotonic() - started, process.memory_info().rss - before
        assert client.run(run_id)[0].state is RunState.SUCCEEDED
    assert daemon.stop() == 0
    store = Store(daemon.home.database)
    assert store.newest_revision() >= FLOOD
    store.close()
    assert grown < GROWTH_BYTES
    if SOAK:
        with capsys.disabled():
            sys.stdout.write(
                f"\n{FLOOD} events at {FLOOD / took:.0f}/s: daemon grew by {grown / 1e6:.1f} MB, "
                f"slowest GetRun {1000 * slowest:.0f} ms\n"
            )


def test_a_worker_that_prints_without_end_fills_no_disk(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = create(client, tmp_path, "shouts")
        path = daemon.home.run(run_id).worker_log
        until(lambda: path.exists() and path.stat().st_size > 65_536, what="it prints")
        end, sizes = time.monotonic() + PRINTED_SECONDS, []
        while time.monotonic() < end:
            sizes.append(path.stat().st_size)
            asked = time.monotonic()
            client.run(run_id)
            assert time.monotonic() - asked < 1.5
            time.sleep(0.02)
        # What a pipe to a disk takes between two looks at the file comes on top.
        assert max(sizes) < 64 * LIMIT_BYTES
        assert min(sizes[len(sizes) // 2 :]) < LIMIT_BYTES
        assert any(later < earlier for earlier, later in itertools.pairwise(sizes))
        os.kill(daemon.workers()[0].pid, signal.SIGKILL)
        reach(client, run_id, RunState.INTERRUPTED)
    assert path.stat().st_size <= LIMIT_BYTES


@pytest.mark.parametrize("kind", ["ignores SIGTERM", "is stopped", "seems to have started at another time"])
def test_a_worker_that_outlives_its_daemon_is_ended_at_the_next_start(
    daemon: Daemon, tmp_path: Path, kind: str
) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = create(client, tmp_path, "stays")
        reach(client, run_id, RunState.RUNNING)
    [worker] = daemon.workers()
    if kind == "is stopped":
        worker.suspend()
    daemon.kill()
    assert daemon.workers() == [worker]
    if kind.startswith("seems"):  # the clock was set, or the system counts from another boot
        store = Store(daemon.home.database)
        [record] = store.workers()
        moved = WorkerRecord(record.run_id, record.pid, record.started + 3600.0)
        store.transact([lambda store: store.put_worker(moved)])
        store.close()
    daemon.start()
    assert daemon.orphans() == []
    with daemon.client() as client:
        run = client.run(run_id)[0]
        assert (run.state, run.error_reason) == (RunState.INTERRUPTED, "DAEMON_DIED")


def test_a_worker_nobody_remembers_never_begins(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start("worker.started=kill")
    with daemon.client() as client:
        create(client, tmp_path, "stays")  # once it has begun, nothing but SIGKILL ends it
    until(lambda: not daemon.alive, what="the daemon died before it remembered the worker")
    until(lambda: not daemon.workers(), 10.0, "the worker left by itself")


def test_the_teacher_answers_while_workers_die(
    make_daemon: MakeDaemon, tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = make_daemon(teacher=True)
    daemon.start()
    with daemon.client() as client:
        list(client.load_teacher(str(tiny_teacher)))
        alone = latencies(client, 20)
        with workers_dying(daemon, tmp_path, str(tiny_teacher)) as deaths:
            until(lambda: deaths, what="a worker died")
            meanwhile = latencies(client, 40)
            until(lambda: len(deaths) >= 2, what="more workers died")
    if SOAK:
        with capsys.disabled():
            sys.stdout.write(
                f"\nteacher: median {1000 * np.median(alone):.1f} ms alone, {1000 * np.median(meanwhile):.1f} ms "
                f"(p95 {1000 * np.quantile(meanwhile, 0.95):.1f} ms) while {len(deaths)} workers died\n"
            )


def latencies(client: Client, count: int) -> list[float]:
    found = []
    for number in range(count):
        ids = np.arange(1 + number, 25 + number, dtype=np.int32)
        asked = time.monotonic()
        [answer] = client.score([ScoreRequest(ids, 1, ScoreWants(top_k=4))], use_cache=False)
        found.append(time.monotonic() - asked)
        assert np.isfinite(answer.scores.top_logprobs).all()
    return found


@contextmanager
def workers_dying(daemon: Daemon, root: Path, teacher: str) -> Iterator[list[str]]:
    """Runs whose workers segfault, one after the other."""
    deaths: list[str] = []
    over = threading.Event()

    def keep_dying() -> None:
        with daemon.client() as client:
            while not over.is_set():
                values = run_values(root, session_id="segfault", teacher_model_path=teacher)
                run_id = client.create_run(values)[0].run_id
                deaths.append(reach(client, run_id, RunState.INTERRUPTED).run_id)

    thread = threading.Thread(target=keep_dying)
    thread.start()
    try:
        yield deaths
    finally:
        over.set()
        thread.join()
