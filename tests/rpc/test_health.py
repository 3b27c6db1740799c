"""The health service speaks for the daemon, and under the teacher service's name for the teacher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd_daemon.client import Client
from opd_daemon.errors import OpdError
from opd_daemon.home import Home
from tests.e2e.conftest import DaemonProcess

TEACHER = "opd_daemon.v1.TeacherService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def load(client: Client, model: Path) -> None:
    for _ in client.load_teacher(str(model)):
        pass


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true in time: the teacher's state is told after the call that changed it."""
    deadline = time.monotonic() + 20.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_teacher_that_can_not_be_loaded_is_not_served_and_the_daemon_is(tmp_path: Path, tiny_teacher: Path) -> None:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    daemon = DaemonProcess(home)
    try:
        with contextlib.closing(daemon.client()) as client, grpc.insecure_channel(f"unix:{home.socket}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def status(service: str) -> int:
                return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)

            assert eventually(lambda: status("") == SERVING)
            assert status(TEACHER) == NOT_SERVING
            with pytest.raises(OpdError):
                load(client, broken)
            assert (status(""), status(TEACHER)) == (SERVING, NOT_SERVING)
            load(client, tiny_teacher)
            assert eventually(lambda: status(TEACHER) == SERVING)
            client.unload_teacher()
            assert eventually(lambda: status(TEACHER) == NOT_SERVING)
            assert status("") == SERVING
    finally:
        daemon.stop()
