"""Finding the daemon, and what is said when there is none."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from opd_daemon.client import Client, Endpoint, LocalDaemon, find_endpoint
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from tests.client.scripted import ScriptedRuns, scripted


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPD_ADDRESS", raising=False)
    monkeypatch.delenv("OPD_TOKEN", raising=False)


def publish(home: Home, **facts: object) -> None:
    home.runtime.mkdir(parents=True)
    home.discovery.write_text(json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1", "token": "t", **facts}))


def test_without_a_discovery_file_the_error_names_the_home_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=rf"no daemon is running for {tmp_path}; start one with 'opd serve'") as found:
        find_endpoint(Home(tmp_path))
    assert found.value.reason is Reason.DAEMON_NOT_RUNNING


def test_the_discovery_file_of_a_dead_daemon_does_not_count(tmp_path: Path) -> None:
    publish(Home(tmp_path), pid=2**22 + 1)
    with pytest.raises(OpdError) as found:
        find_endpoint(Home(tmp_path))
    assert found.value.reason is Reason.DAEMON_NOT_RUNNING


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "address": "a", "token": "t"}'])
def test_a_damaged_discovery_file_is_named(tmp_path: Path, content: str) -> None:
    home = Home(tmp_path)
    home.runtime.mkdir()
    home.discovery.write_text(content)
    with pytest.raises(OpdError, match=r"daemon\.json: can't be read"):
        find_endpoint(home)


def test_the_environment_overrides_the_discovery_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Home(tmp_path), address="unix:/file", token="file")
    monkeypatch.setenv("OPD_ADDRESS", "127.0.0.1:9")
    assert find_endpoint(Home(tmp_path)) == Endpoint("127.0.0.1:9", "file")
    monkeypatch.setenv("OPD_TOKEN", "mine")
    assert find_endpoint(Home(tmp_path)) == Endpoint("127.0.0.1:9", "mine")
    assert find_endpoint(Home(tmp_path), "127.0.0.1:8", "given") == Endpoint("127.0.0.1:8", "given")


def test_an_address_without_any_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="set OPD_TOKEN"):
        find_endpoint(Home(tmp_path), "127.0.0.1:9")


def test_a_port_nobody_listens_on_is_reported_as_no_daemon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with Client(address, "t") as client, pytest.raises(OpdError, match=f"no daemon answers at {address}") as found:
            client.teacher()
    assert found.value.reason is Reason.DAEMON_NOT_RUNNING


def test_the_daemon_refuses_a_wrong_token(daemon: LocalDaemon) -> None:
    address = find_endpoint(daemon.home).address
    with Client(address, "wrong") as client, pytest.raises(OpdError) as found:
        client.teacher()
    assert found.value.reason is Reason.WRONG_TOKEN


def test_every_call_carries_the_token() -> None:
    runs = ScriptedRuns(events=1)
    with scripted(runs) as client:
        list(client.runs())
        next(client.watch(0))
    assert runs.tokens == {"Bearer secret"}


def test_runs_are_read_page_by_page() -> None:
    runs = ScriptedRuns()
    with scripted(runs) as client:
        found = client.runs()
        assert next(found).run_id == "run-0"
        assert len(runs.requests) == 1
        assert [run.run_id for run in found] == [f"run-{place}" for place in range(1, 6)]
    assert [request.page_token for request in runs.requests] == ["", "1", "2"]


def test_an_idempotent_call_is_repeated_while_the_daemon_is_unavailable() -> None:
    runs = ScriptedRuns(failures=2)
    with scripted(runs) as client:
        assert len(list(client.runs())) == 6
    assert len(runs.requests) == 2 + 3


def test_a_call_with_an_effect_is_never_repeated() -> None:
    runs = ScriptedRuns(failures=1)
    with scripted(runs) as client:
        with pytest.raises(OpdError):
            client.resume("run-1")
        assert len(runs.requests) == 1
        assert client.resume("run-1")[1] == 1
