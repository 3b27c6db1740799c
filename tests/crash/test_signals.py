"""How the daemon ends when it is asked to, and what it takes without ending."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd_daemon.client import Client
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.runs.stall import StallPolicy
from opd_daemon.store import Store
from opd_daemon.types import Event, RunState
from opd_daemon.v1 import run_pb2, run_pb2_grpc
from opd_daemon.wire.errors import from_rpc_error
from tests.crash.stage import Daemon, run_values, until

SOAK = os.environ.get("OPD_SOAK") == "1"
PAUSE_SECONDS = 60.0 if SOAK else 2.0

MakeDaemon = Callable[..., Daemon]
LONG_RUN = {"num_steps": 100_000}


def running(client: Client, root: Path, **changes: object) -> str:
    run_id = client.create_run(run_values(root, **changes))[0].run_id
    until(lambda: client.run(run_id)[0].step > 0, what="its first step")
    return run_id


class Ending:
    """What clients see while a daemon drains: moments by name, in seconds since SIGTERM."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.moments: dict[str, float] = {}
        self.last_states: list[str] = []
        self._daemon = daemon
        self._client = client
        watches = threading.Thread(target=self._watch)
        watches.start()
        time.sleep(0.2)
        self._start = time.monotonic()
        daemon.signal(signal.SIGTERM)
        self._look()
        watches.join(30)

    def _note(self, name: str) -> None:
        self.moments.setdefault(name, time.monotonic() - self._start)

    def _look(self) -> None:
        health = health_pb2_grpc.HealthStub(self._client.channel)
        while self._daemon.alive:
            try:
                if health.Check(health_pb2.HealthCheckRequest(), timeout=2).status != 1:
                    self._note("not serving")
                self._client.create_run({**run_values(self._daemon.home.root), "num_steps": 1})
            except OpdError as error:
                if error.reason is Reason.SHUTTING_DOWN:
                    self._note("no new runs")
            except grpc.RpcError:
                self._note("unreachable")
            time.sleep(0.005)
        self._note("gone")

    def _watch(self) -> None:
        stub = run_pb2_grpc.RunServiceStub(self._client.channel)
        try:
            for message in stub.WatchEvents(run_pb2.WatchEventsRequest(after_revision=0)):
                self.last_states += [
                    str(event.run_state_changed.message)
                    for event in message.events.events
                    if event.HasField("run_state_changed")
                ]
        except grpc.RpcError as error:
            self.ended_by = from_rpc_error(error)
        self._note("watch ended")


def test_sigterm_drains_in_order_and_watchers_see_it_all(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = running(client, tmp_path, **LONG_RUN)
        ending = Ending(daemon, client)
    assert daemon.wait() == 0
    seen = [name for name, _ in sorted(ending.moments.items(), key=lambda entry: entry[1])]
    assert seen.index("not serving") < seen.index("watch ended") < seen.index("gone")
    assert seen.index("no new runs") < seen.index("watch ended")
    assert ending.ended_by.reason is Reason.SHUTTING_DOWN
    assert ending.ended_by.code is Code.UNAVAILABLE
    # The last thing a watcher sees is how its run came to rest, with the checkpoint that was written for it.
    assert "resume goes on from here" in ending.last_states[-1]
    store = Store(daemon.home.database)
    run = store.get_run(run_id)
    assert (run.state, run.checkpoint_step) == (RunState.INTERRUPTED, run.step)
    store.close()
    assert not daemon.home.discovery.exists()
    assert not daemon.home.socket.exists()
    assert not Path(f"{daemon.home.database}-wal").exists()  # SQLite takes it away when the last one closes


def test_sigterm_twice_leaves_now_and_loses_nothing(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = client.create_run(run_values(tmp_path, session_id="stays"))[0].run_id
        until(lambda: client.run(run_id)[0].state is RunState.RUNNING)
        daemon.signal(signal.SIGTERM)
        until(lambda: client.run(run_id)[0].state is RunState.STOPPING)
        asked = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 1
        assert time.monotonic() - asked < 2.0  # the grace is 5 s
    daemon.start()
    assert daemon.orphans() == []
    with daemon.client() as client:
        assert client.run(run_id)[0].state is RunState.INTERRUPTED


def test_a_client_goes_on_with_the_daemons_successor(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = client.create_run(run_values(tmp_path))[0].run_id
        daemon.kill()
        daemon.start()
        # The channel has found the same socket again by itself, with the token of the one before.
        grpc.channel_ready_future(client.channel).result(20)
        assert client.run(run_id)[0].run_id == run_id
        daemon.kill()
        daemon.start()
        grpc.channel_ready_future(client.channel).result(20)
        assert isinstance(next(iter(client.watch(0))), Event)


def test_a_terminal_that_closes_ends_no_training(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = running(client, tmp_path, **LONG_RUN)
        daemon.signal(signal.SIGHUP)
        step = client.run(run_id)[0].step
        until(lambda: client.run(run_id)[0].step > step + 2, what="it goes on")
    assert daemon.stop() == 0


def test_sigterm_while_the_teacher_loads_ends_the_daemon(
    make_daemon: MakeDaemon, tmp_path: Path, tiny_teacher: Path
) -> None:
    daemon = make_daemon(teacher=True, teacher_path=str(tiny_teacher))
    daemon.start("teacher.load=sleep:1")
    until(lambda: "teacher.load" in daemon.points_hit(), what="it loads")
    asked = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - asked < 10.0


def test_death_while_the_teacher_loads_leaves_a_daemon_that_loads_it_again(
    make_daemon: MakeDaemon, tmp_path: Path, tiny_teacher: Path
) -> None:
    daemon = make_daemon(teacher=True)
    daemon.start("teacher.load=kill")
    with daemon.client() as client, pytest.raises(OpdError):
        list(client.load_teacher(str(tiny_teacher)))
    assert daemon.wait() == -signal.SIGKILL
    daemon.start()
    with daemon.client() as client:
        assert [progress.phase for progress in client.load_teacher(str(tiny_teacher))][-1] == "ready"


def test_sigterm_during_a_commit_stores_it_whole(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start("store.commit.before=sleep:0.5@2")  # the first one is at the start
    with daemon.client() as client:
        answers: list[str] = []

        def create() -> None:
            values = run_values(tmp_path, run_id="mine")
            answers.append(client.create_run(values, request_id="once")[0].run_id)

        asking = threading.Thread(target=create)
        asking.start()
        until(lambda: "store.commit.before" in daemon.points_hit(), what="it commits")
        assert daemon.stop() == 0
        asking.join(30)
    assert answers == ["mine"]  # who has been let in gets an answer
    database = sqlite3.connect(daemon.home.database)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT run_id FROM runs").fetchall() == [("mine",)]
    database.close()


@pytest.mark.parametrize("everybody", [False, True], ids=["of the daemon", "of the workers too, as a machine sleeps"])
def test_a_pause_costs_time_and_nothing_else(daemon: Daemon, tmp_path: Path, everybody: bool) -> None:
    daemon.start()
    with daemon.client() as client:
        run_id = running(client, tmp_path, num_steps=60)
        revisions: list[int] = []

        def follow() -> None:
            for item in client.watch(0, run_id):
                if isinstance(item, Event):
                    revisions.append(item.revision)
                    if item.payload.get("state") == "SUCCEEDED":
                        return

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        asleep = daemon.workers() if everybody else []
        assert len(asleep) == everybody
        for process in asleep:
            process.suspend()
        daemon.signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        for process in asleep:
            process.resume()
        daemon.signal(signal.SIGCONT)
        until(lambda: client.run(run_id)[0].state.resting, 120.0, "it ends")
        run = client.run(run_id)[0]
        assert (run.state, run.error_message) == (RunState.SUCCEEDED, "")
        follower.join(30)
        assert not follower.is_alive()
        assert revisions == sorted(set(revisions))
    assert daemon.stop() == 0


def test_a_pause_of_the_daemon_is_no_silence_of_its_worker(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """What the worker said meanwhile is unread when the daemon wakes, and the time it has is over."""
    stall = StallPolicy(warning=2.0, limit=4.0)
    daemon = make_daemon(stall=stall)
    daemon.start()
    with daemon.client() as client:
        run_id = running(client, tmp_path, num_steps=60)
        _, revision = client.run(run_id)
        daemon.signal(signal.SIGSTOP)
        time.sleep(stall.limit + 1.0)
        daemon.signal(signal.SIGCONT)
        until(lambda: client.run(run_id)[0].state.resting, 60.0, "it ends")
        run = client.run(run_id)[0]
    assert (run.state, run.error_message) == (RunState.SUCCEEDED, "")
    assert daemon.stop() == 0
    store = Store(daemon.home.database)
    told = [str(event.payload.get("text")) for event in store.events_after(revision, run_id, 10_000)[0]]
    store.close()
    assert told
    assert not [text for text in told if "no progress" in text]
