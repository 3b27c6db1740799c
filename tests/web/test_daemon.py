"""A real daemon's web port: the figures, the link to the page, and that it is there only when asked for."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from opd_daemon.cli.main import run
from opd_daemon.client import Client, find_endpoint
from opd_daemon.errors import OpdError
from opd_daemon.home import Home
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants
from opd_daemon.v1 import run_pb2, run_pb2_grpc

GET_RUN = "/opd_daemon.v1.RunService/GetRun"


@contextmanager
def serving(home: Home, *options: str) -> Iterator[int]:
    """`opd serve` until the block ends; its pid."""
    command = [sys.executable, "-m", "opd_daemon.cli", "serve", "--home", str(home.root), "--until-stdin-closes"]
    with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert " serves " in process.stdout.readline()
        yield process.pid
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == 0


pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("web") / "home")
    with serving(home, "--web-port", "0"):
        yield home


@pytest.fixture
def client(home: Home) -> Iterator[Client]:
    with Client.find(home) as client:
        yield client


def get(home: Home, target: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", find_endpoint(home).web_port, timeout=10)
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def figures(home: Home) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, headers, text = get(home, "/metrics", Authorization=f"Bearer {find_endpoint(home).token}")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(text))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def figure(home: Home, name: str, **labels: str) -> float:
    return figures(home).get((name, frozenset(labels.items())), 0.0)


def test_calls_are_counted_by_method_and_code(home: Home, client: Client) -> None:
    client.teacher()
    with pytest.raises(OpdError):
        client.run("nobody")
    endpoint = find_endpoint(home)
    with grpc.insecure_channel(endpoint.address) as bare:
        for method in (GET_RUN, "/opd_daemon.v1.RunService/Nothing"):
            with pytest.raises(grpc.RpcError):
                bare.unary_unary(method)(b"", timeout=5)
    assert figure(home, "opd_rpc_requests_total", method=GET_RUN, code="NOT_FOUND") == 1
    assert figure(home, "opd_rpc_requests_total", method=GET_RUN, code="UNAUTHENTICATED") == 1
    assert figure(home, "opd_rpc_requests_total", method="unknown", code="UNIMPLEMENTED") == 1
    teacher = "/opd_daemon.v1.TeacherService/GetTeacher"
    assert figure(home, "opd_rpc_requests_total", method=teacher, code="OK") >= 1
    assert figure(home, "opd_rpc_duration_seconds_count", method=GET_RUN) == 2
    assert figure(home, "opd_rpc_duration_seconds_bucket", method=GET_RUN, le="+Inf") == 2


def test_watchers_are_counted_while_they_watch(home: Home, client: Client) -> None:
    stub = run_pb2_grpc.RunServiceStub(client.channel)
    watches = [stub.WatchEvents(run_pb2.WatchEventsRequest(), timeout=20) for _ in range(3)]
    for watch in watches:
        next(watch)
    assert figure(home, "opd_watchers") == 3
    for watch in watches:
        watch.cancel()
    deadline = time.monotonic() + 10
    while figure(home, "opd_watchers"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watch_method = "/opd_daemon.v1.RunService/WatchEvents"
    assert figure(home, "opd_rpc_requests_total", method=watch_method, code="CANCELLED") == 3


def test_the_teachers_work_and_its_cache_are_counted(home: Home, client: Client, tiny_teacher: Path) -> None:
    assert figure(home, "opd_teacher_state", state="READY") == 0
    for _ in client.load_teacher(str(tiny_teacher)):
        pass
    for _ in range(2):
        client.generate([GenerateRequest((5, 6, 7), 4, temperature=0.0)])
    client.score([ScoreRequest(np.array([5, 6, 7], np.int32), 1, ScoreWants())] * 2, use_cache=False)
    assert figure(home, "opd_teacher_state", state="READY") == 1
    assert 1 <= figure(home, "opd_teacher_generated_tokens_total") <= 4
    assert figure(home, "opd_teacher_scored_tokens_total") == 6
    assert figure(home, "opd_teacher_scored_sequences_total") == 2
    assert figure(home, "opd_cache_hits_total") == 1
    assert figure(home, "opd_cache_misses_total") == 1
    assert figure(home, "opd_mlx_active_bytes") > 0
    assert figure(home, "opd_events_total", kind="TEACHER") >= 1


def test_the_daemon_tells_of_itself(home: Home) -> None:
    assert figure(home, "opd_process_resident_memory_bytes") > 10 << 20
    assert figure(home, "opd_runs", state="RUNNING") == 0
    assert figure(home, "opd_workers") == 0
    assert [labels for name, labels in figures(home) if name == "opd_build_info"]


def test_names_follow_the_conventions(home: Home) -> None:
    status, _, text = get(home, "/metrics", Authorization=f"Bearer {find_endpoint(home).token}")
    assert status == 200
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("opd_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb"))


def test_opd_web_prints_a_link_that_opens_the_page_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPD_HOME", str(home.root))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run(["web"]) == 0
    link = capsys.readouterr().out.strip()
    endpoint = find_endpoint(home)
    site = f"http://127.0.0.1:{endpoint.web_port}"
    assert link.startswith(f"{site}/login?code=")
    assert endpoint.token not in link
    status, headers, _ = get(home, link.removeprefix(site))
    assert status == 303
    status, _, page = get(home, "/", Cookie=headers["set-cookie"].partition(";")[0])
    assert status == 200
    assert "Teacher" in page
    assert get(home, link.removeprefix(site))[0] == 401


def test_without_the_option_nothing_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("OPD_HOME", str(home.root))
    with serving(home):
        assert json.loads(home.discovery.read_text())["web_port"] is None
        assert run(["web"]) == 2
    assert "--web-port" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = find_endpoint(home).web_port
    assert taken
    assert run(["serve", "--home", str(tmp_path / "other"), "--web-port", str(taken)]) == 2
    assert f"--web-port {taken}" in capsys.readouterr().err
