"""A watch that survives what happens to its connection."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind
from tests.client.scripted import STORE, ScriptedRuns, scripted


def test_a_dropped_watch_goes_on_without_gap_or_repetition() -> None:
    runs, lost = ScriptedRuns(events=10, drop_after=3), []
    with scripted(runs) as client:
        events = list(islice(client.watch(0, on_lost=lost.append), 10))
    assert [event.revision for event in events if isinstance(event, Event)] == list(range(1, 11))
    assert [request.after_revision for request in runs.requests] == [0, 3, 6, 9]
    assert [request.expected_store_id for request in runs.requests] == ["", STORE, STORE, STORE]
    assert len(lost) == 3


def test_a_watch_from_now_resumes_at_the_revision_it_began_with() -> None:
    runs, lost = ScriptedRuns(events=5), []

    def leave_after_the_second(error: OpdError) -> None:
        lost.append(error)
        if len(lost) == 2:
            raise KeyboardInterrupt

    with scripted(runs) as client, pytest.raises(KeyboardInterrupt):
        next(client.watch(on_lost=leave_after_the_second))
    assert not runs.requests[0].HasField("after_revision")
    assert [request.after_revision for request in runs.requests[1:]] == [5]


def test_a_watch_gives_up_when_no_daemon_comes_back(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.runtime.mkdir()
    home.discovery.write_text(json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1", "token": "t"}))
    with Client.find(home) as client, pytest.raises(OpdError) as found:
        next(client.watch(0, patience=0.3))
    assert found.value.reason is Reason.DAEMON_NOT_RUNNING


def test_a_cursor_from_the_future_is_an_error_and_not_retried(client: Client) -> None:
    with pytest.raises(OpdError) as found:
        next(client.watch(10**9))
    assert found.value.reason is Reason.REVISION_IN_FUTURE


def test_a_cursor_of_another_store_is_an_error(client: Client) -> None:
    with pytest.raises(OpdError) as found:
        next(client.watch(0, store_id="another"))
    assert found.value.reason is Reason.STORE_CHANGED


def test_a_watch_outlives_a_restart_of_the_daemon(tmp_path: Path, tiny_teacher: Path) -> None:
    home = Home(tmp_path / "home")
    with LocalDaemon(home):
        client = Client.find(home)
        for _ in client.load_teacher(str(tiny_teacher)):
            pass
        watch = client.watch(0, patience=60.0)
        before = next(watch)
        first_address = client.connection.endpoint
    with LocalDaemon(home) as second, client, second.client() as other:
        for _ in other.load_teacher(str(tiny_teacher)):
            pass
        after = next(watch)
        assert client.connection.endpoint != first_address
        known = list(islice(other.watch(0), 2))
    seen = [item for item in [before, after] if isinstance(item, Event)]
    assert [event.revision for event in seen] == [event.revision for event in known if isinstance(event, Event)]
    assert {event.kind for event in seen} == {EventKind.TEACHER}
