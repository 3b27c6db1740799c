"""The same over the wire, with a real daemon: edges of the cursor, and a kill -9 under clients."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.store import Store
from opd_daemon.types import Event
from opd_daemon.v1 import run_pb2, run_pb2_grpc
from tests.bad_inputs.soak import SOAK
from tests.test_events import NOW, event
from tests.test_store import make_run

EVENTS = 20
STORM = 200 if SOAK else 60


def filled(home: Home) -> None:
    """A store of twenty events of run `r1`, of which the first nine are compacted."""
    store = Store(home.database)
    store.transact([lambda store: store.insert_run(make_run(created_at=NOW), [event("created")], "")])
    for number in range(2, EVENTS + 1):
        store.apply(None, [event(str(number))])
    store.compact(10)
    store.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("wire") / "home")


@pytest.fixture(scope="module")
def daemon(home: Home) -> Iterator[LocalDaemon]:
    filled(home)
    with LocalDaemon(home) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: LocalDaemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def newest(client: Client) -> int:
    return run_pb2_grpc.RunServiceStub(client.channel).ListRuns(run_pb2.ListRunsRequest()).revision


@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        (-(2**63), Reason.INVALID_REQUEST),
        (-1, Reason.INVALID_REQUEST),
        (1, Reason.REVISION_COMPACTED),
        (8, Reason.REVISION_COMPACTED),
        (2**63 - 1, Reason.REVISION_IN_FUTURE),
    ],
)
def test_a_cursor_that_means_nothing_is_refused_over_the_wire(client: Client, cursor: int, reason: Reason) -> None:
    with pytest.raises(OpdError) as caught:
        next(client.watch(cursor))
    assert caught.value.reason is reason


def test_now_is_a_cursor_and_one_more_is_the_future(client: Client) -> None:
    revision = newest(client)
    stub = run_pb2_grpc.RunServiceStub(client.channel)
    call = stub.WatchEvents(run_pb2.WatchEventsRequest(after_revision=revision))
    assert next(call).started.revision == revision
    call.cancel()
    with pytest.raises(OpdError) as caught:
        next(client.watch(revision + 1))
    assert caught.value.reason is Reason.REVISION_IN_FUTURE
    assert caught.value.metadata["revision"] == str(revision)


@pytest.mark.parametrize("cursor", [0, 9])
def test_the_edge_of_compaction_loses_nothing(client: Client, cursor: int) -> None:
    seen = [item.revision for item in islice(client.watch(cursor, "r1"), 11) if isinstance(item, Event)]
    assert seen == list(range(10, 21))


def test_another_store_is_refused_over_the_wire(client: Client) -> None:
    with pytest.raises(OpdError) as caught:
        next(client.watch(9, store_id="another"))
    assert caught.value.reason is Reason.STORE_CHANGED


class Follower(threading.Thread):
    """A client that follows everything and resumes by itself."""

    def __init__(self, home: Home, last: int) -> None:
        super().__init__(daemon=True)
        self.seen: queue.Queue[int] = queue.Queue()
        self._client, self._last = Client.find(home), last

    def run(self) -> None:
        with self._client as client:
            for item in client.watch(0, patience=60.0):
                if isinstance(item, Event):
                    self.seen.put(item.revision)
                    if item.revision >= self._last:
                        return


def test_a_storm_of_clients_resumes_by_itself_after_kill_9_without_gap_or_repetition(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    filled(home)
    with LocalDaemon(home) as first:
        storm = [Follower(home, last=2 * EVENTS) for _ in range(STORM)]
        for follower in storm:
            follower.start()
        for follower in storm:
            while follower.seen.qsize() < EVENTS - 9:
                time.sleep(0.01)
        os.kill(first.pid, signal.SIGKILL)
    store = Store(home.database)  # what happened while nobody could watch
    for number in range(EVENTS + 1, 2 * EVENTS + 1):
        store.apply(None, [event(str(number))])
    store.close()
    with LocalDaemon(home):
        for follower in storm:
            follower.join(60)
    for follower in storm:
        assert list(follower.seen.queue) == list(range(10, 2 * EVENTS + 1))
