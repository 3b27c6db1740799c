"""Tokens: which open what, and the files they are kept in."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from opd_daemon.client import LocalDaemon, find_endpoint
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.rpc.access import WORKER_METHODS, Caller, Gate
from opd_daemon.runs.workers import Workers
from opd_daemon.token_file import kept_token, read_token
from opd_daemon.v1 import catalog_pb2, run_pb2, run_pb2_grpc, teacher_pb2, worker_pb2
from opd_daemon.wire.errors import from_rpc_error
from tests.crash.stage import Daemon, run_values, until

OWN = "t" * 43
FILES = (teacher_pb2, run_pb2, catalog_pb2, worker_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
def gate() -> Gate:
    return Gate(OWN, {"w" * 43: "run-1"}.get)


def refusal(gate: Gate, method: str, header: str | None) -> Reason | None:
    try:
        gate.admit(method, header)
    except OpdError as error:
        return error.reason
    return None


@pytest.mark.parametrize("method", [*METHODS, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"])
def test_nothing_is_called_without_the_token(gate: Gate, method: str) -> None:
    assert refusal(gate, method, None) is Reason.MISSING_TOKEN
    assert refusal(gate, method, "") is Reason.MISSING_TOKEN
    for wrong in ("Bearer", "Bearer ", f"Bearer {OWN[:-1]}", f"Bearer {OWN}t", f"Bearer {OWN} ", f"Basic {OWN}", OWN):
        assert refusal(gate, method, wrong) is Reason.WRONG_TOKEN, wrong
    assert refusal(gate, method, f"Bearer {OWN}") is None


@pytest.mark.parametrize("method", METHODS)
def test_a_workers_token_opens_what_workers_need_and_nothing_else(gate: Gate, method: str) -> None:
    expected = None if method in WORKER_METHODS else Reason.OUT_OF_SCOPE
    assert refusal(gate, method, f"Bearer {'w' * 43}") is expected


def test_every_method_a_worker_may_call_exists() -> None:
    assert set(METHODS) >= WORKER_METHODS


# What decides about runs, files and other people's work; nothing may be added here without thinking.
CLIENTS_ONLY = {
    "TeacherService": {"LoadTeacher", "PruneCache"},
    "RunService": {
        *("CreateRun", "ListRuns", "StopRun", "ResumeRun", "DeleteRun", "ListMetrics", "ListCheckpoints"),
        *("DownloadAdapter", "DownloadReport", "CompareModels", "UploadPrompts"),
    },
    "CatalogService": {
        *("ListTrainers", "ListDivergences", "ListPlugins", "ListModels", "ListAdapters", "ListPresets"),
    },
    "WorkerService": set[str](),
}


def test_the_calls_closed_to_workers_are_the_ones_known_here() -> None:
    closed = {method for method in METHODS if method not in WORKER_METHODS}
    assert closed == {f"/opd_daemon.v1.{name}/{call}" for name, calls in CLIENTS_ONLY.items() for call in calls}


def test_tokens_are_compared_in_constant_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring would be guessing: what counts is that no comparison but this one decides."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr("secrets.compare_digest", compare)
    assert refusal(gate, METHODS[0], f"Bearer {OWN}") is Reason.WRONG_TOKEN
    workers = Workers(Home(Path("/nowhere")))
    workers._run_of_token |= {"a": "run-1", "b": "run-2"}
    assert workers.run_for_token("b") is None
    assert compared == [(OWN.encode(), OWN.encode()), (b"a", b"b"), (b"b", b"b")]


def test_a_workers_token_knows_its_run_until_the_worker_has_gone() -> None:
    workers = Workers(Home(Path("/nowhere")))
    workers._run_of_token |= {"a": "run-1", "b": "run-2"}
    assert [workers.run_for_token(token) for token in ("a", "b", "", "c")] == ["run-1", "run-2", None, None]


@pytest.mark.parametrize("run_id", ["run-2", "", "run-1 ", "RUN-1"])
def test_a_worker_reaches_no_other_run(run_id: str) -> None:
    with pytest.raises(OpdError) as refused:
        Caller("run-1").require_run(run_id)
    assert refused.value.reason is Reason.OUT_OF_SCOPE
    Caller("run-1").require_run("run-1")
    Caller().require_run(run_id)


def test_a_running_worker_sees_its_own_run_and_no_other(tmp_path: Path) -> None:
    """With the tokens of two real workers, which have them in their environment."""
    daemon = Daemon(tmp_path)
    try:
        daemon.start()
        with daemon.client() as client:
            for run_id in ("one", "two"):
                client.create_run(run_values(tmp_path, run_id=run_id, session_id="hangs"))
            until(lambda: len(daemon.workers()) == 2, what="both run")
            tokens = {worker.cmdline()[-1]: worker.environ()["OPD_WORKER_TOKEN"] for worker in daemon.workers()}
        with grpc.insecure_channel(find_endpoint(daemon.home).address) as channel:
            runs = run_pb2_grpc.RunServiceStub(channel)
            for own, other in (("one", "two"), ("two", "one")):
                worker = [("authorization", f"Bearer {tokens[own]}")]
                assert runs.GetRun(run_pb2.GetRunRequest(run_id=own), metadata=worker).run.run_id == own
                watch = runs.WatchEvents(run_pb2.WatchEventsRequest(run_id=own), metadata=worker, timeout=10)
                assert next(watch).HasField("started")
                watch.cancel()
                for asked in (other, "none"):
                    with pytest.raises(grpc.RpcError) as refused:
                        runs.GetRun(run_pb2.GetRunRequest(run_id=asked), metadata=worker)
                    assert from_rpc_error(refused.value).reason is Reason.OUT_OF_SCOPE
                for asked in (other, "none", ""):
                    with pytest.raises(grpc.RpcError) as refused:
                        next(runs.WatchEvents(run_pb2.WatchEventsRequest(run_id=asked), metadata=worker, timeout=10))
                    assert from_rpc_error(refused.value).reason is Reason.OUT_OF_SCOPE
    finally:
        daemon.end()


def status(local: LocalDaemon, metadata: Iterable[tuple[str, str]], method: str) -> OpdError:
    with grpc.insecure_channel(find_endpoint(local.home).address) as channel:
        call: Any = channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", metadata=tuple(metadata), timeout=10)
    return from_rpc_error(refused.value)


def test_a_token_in_the_wrong_place_is_no_token(local: LocalDaemon) -> None:
    token = find_endpoint(local.home).token
    listing = "/opd_daemon.v1.RunService/ListRuns"
    assert status(local, [], listing).reason is Reason.MISSING_TOKEN
    assert status(local, [("token", token)], listing).reason is Reason.MISSING_TOKEN
    assert status(local, [("cookie", f"token={token}")], listing).reason is Reason.MISSING_TOKEN
    # There is no such method, and no query string either.
    assert status(local, [], f"{listing}?token={token}").reason is Reason.NOT_IMPLEMENTED
    assert status(local, [("authorization", "Bearer x"), ("authorization", f"Bearer {token}")], listing).reason is (
        Reason.WRONG_TOKEN
    )


# Files


def test_a_new_token_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    before = os.umask(0)
    try:
        token = kept_token(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(token) >= 43
    assert read_token(file) == kept_token(file) == token


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o601])
def test_a_token_file_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    kept_token(file)
    file.chmod(mode)
    for read in (read_token, kept_token):
        with pytest.raises(OpdError, match=rf"others may read it \(mode 0{mode:o}\); run 'chmod 600") as refused:
            read(file)
        assert refused.value.reason is Reason.WRONG_TOKEN


def test_a_client_refuses_an_open_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    kept_token(file)
    monkeypatch.setenv("OPD_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("OPD_TOKEN_FILE", str(file))
    assert find_endpoint(Home(tmp_path)).token == read_token(file)
    file.chmod(0o644)
    with pytest.raises(OpdError, match="chmod 600"):
        find_endpoint(Home(tmp_path))


@pytest.mark.parametrize("content", [b"", b"short", b"\n" * 50, b"t" * 5000, b"t" * 40 + b"\nmore", "é".encode() * 40])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(OpdError, match="holds no token"):
        read_token(file)


def test_a_token_is_read_from_plain_files_only_and_never_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (pipe, Path("/dev/null")):
        with pytest.raises(OpdError, match=r"not a plain file|others may read"):
            read_token(path)
    with pytest.raises(OpdError, match="can't be read"):
        read_token(tmp_path / "missing")
    with pytest.raises(OpdError, match="can't be written"):
        kept_token(tmp_path / "no" / "folder")


def test_a_token_file_is_never_made_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "token"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OpdError):
        kept_token(link)
    assert not (tmp_path / "elsewhere").exists()
