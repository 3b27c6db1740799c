"""The real server with stubs where a model would be: real sockets, real store, real processes, no second of waiting.

Each daemon is a process of its own, forked on Linux from a server that has imported everything; elsewhere it is a fresh
one, as libraries there don't survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from opd_daemon import failpoints
from opd_daemon.client import Client
from opd_daemon.errors import FieldViolation, OpdError
from opd_daemon.home import Home
from opd_daemon.rpc import assembly, server
from opd_daemon.runs import attempt, workers
from opd_daemon.runs.attempt import Teaching
from opd_daemon.runs.stall import USUAL
from opd_daemon.runs.workers import Workers
from opd_daemon.types import Plan

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("scripted_worker.py")
PLAN = Plan(1.0, 1, 2, 3, 4, (), ())
START_SECONDS = 90.0
END_SECONDS = 60.0

Settings = Mapping[str, Any]


class StubOutlook:
    def __init__(self, *_: object, beside: int) -> None:
        """Nothing to check or to measure."""

    def check(self, *_: object) -> list[FieldViolation]:
        return []

    def plan(self, _: object) -> Plan:
        return PLAN


async def already_loaded(_: str) -> None:
    """The teacher of every run is there."""


def serve(home: Path, environment: Mapping[str, str], settings: Settings, *, teacher: bool, descriptors: int) -> None:
    """The body of a daemon process; with `descriptors`, that many files may be open at a time."""
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    os.environ.update(environment)
    failpoints.arm(os.environ)
    log = os.open(home.parent / "daemon.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    assembly.Workers = partial(Workers, command=(sys.executable, "-S", str(WORKER)))  # type: ignore[misc, assignment]
    workers.TERM_SECONDS = 0.5
    attempt.DISK_RETRY_SECONDS = 0.1
    assembly.Outlook = StubOutlook  # type: ignore[misc, assignment]
    if not teacher:
        stub = Teaching(lambda model: model == "/m/teacher", already_loaded)
        assembly.Teaching = lambda *_: stub  # type: ignore[misc, assignment]
    try:
        server.serve(server.ServeSettings(home=Home(home), port=None, **settings))
    except OpdError as error:
        sys.stderr.write(f"opd: {error}\n")
        sys.exit(3)


def starter() -> Any:
    """How daemon processes are made."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash.stage", "tests.crash.jobs"])
    return context


class Daemon:
    """A daemon that can be started again and again on one home. `kill` is kill -9."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.home = Home(root / "home")
        self.home.root.mkdir(exist_ok=True)
        self.hits = root / "hits"
        self.teacher = bool(settings.pop("teacher", False))
        self.descriptors = int(settings.pop("descriptors", 0))
        self.settings = {"stop_grace_seconds": 5.0, "max_concurrent_runs": 2, "stall": USUAL, **settings}
        self.process: Any = None
        self.log = root / "daemon.log"

    def start(self, points: str = "", *, wait: bool = True) -> None:
        paths = os.pathsep.join([str(REPOSITORY), sysconfig.get_path("purelib"), os.environ.get("PYTHONPATH", "")])
        environment = {
            "PYTHONPATH": paths,
            "OPD_FAILPOINTS": points,
            "OPD_TEST_HARNESS": "1",
            "OPD_FAILPOINTS_LOG": str(self.hits),
        }
        arguments = (self.home.root, environment, self.settings)
        named = {"teacher": self.teacher, "descriptors": self.descriptors}
        self.process = starter().Process(target=serve, args=arguments, kwargs=named)
        self.process.start()
        if wait:
            self.until_serving()

    def until_serving(self) -> bool:
        """Wait until earlier runs are taken up; False when the daemon died first."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.process.is_alive():
                return False
            with contextlib.suppress(OSError, ValueError, OpdError):
                if json.loads(self.home.discovery.read_text())["pid"] == self.process.pid and self._serves():
                    return True
            time.sleep(0.02)
        raise AssertionError(f"the daemon did not come up:\n{self.log.read_text()}")

    def _serves(self) -> bool:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with Client.find(self.home) as client:
            health = health_pb2_grpc.HealthStub(client.channel)
            try:
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            except grpc.RpcError:
                return False
            return bool(status == health_pb2.HealthCheckResponse.SERVING)

    @property
    def alive(self) -> bool:
        return bool(self.process and self.process.is_alive())

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def client(self) -> Client:
        return Client.find(self.home)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(END_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        self.process.join(END_SECONDS)
        assert not self.process.is_alive(), f"the daemon did not end:\n{self.log.read_text()[-5000:]}"
        return int(self.process.exitcode)

    def workers(self) -> list[psutil.Process]:
        """Living workers of this home, whoever their parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = str(WORKER) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
                if ours and process.environ().get("OPD_HOME") == str(self.home.root):
                    found.append(process)
        return found

    def orphans(self) -> list[psutil.Process]:
        """Workers that aren't this daemon's."""
        own = self.pid if self.alive else 0
        found = []
        for worker in self.workers():
            with contextlib.suppress(psutil.Error):
                if worker.ppid() != own:
                    found.append(worker)
        return found

    def points_hit(self) -> list[str]:
        return self.hits.read_text().split() if self.hits.exists() else []

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process and self.process.is_alive():
            os.kill(self.pid, signal.SIGCONT)
            self.kill()
        for worker in self.workers():
            with contextlib.suppress(psutil.Error):
                worker.kill()


def run_values(root: Path, **changes: Any) -> dict[str, Any]:
    """A run of the scripted worker; `session_id` says which kind."""
    paths = {"base_model_path": "/m/student", "teacher_model_path": "/m/teacher", "prompts_path": "/d/p.jsonl"}
    return {**paths, "num_steps": 9, "session_id": "trains", "output_adapter_path": str(root / "out"), **changes}


def until(condition: Any, seconds: float = 30.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it never happened: {what or condition}"
        time.sleep(0.02)
