"""A run manager on a real store with real processes; only what the worker does inside is a stub."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pluggy

from opd_daemon import hookspecs
from opd_daemon.config import RunConfig
from opd_daemon.distill.checkpoints import Checkpoints, RunProgress
from opd_daemon.errors import FieldViolation, OpdError
from opd_daemon.events import EventLog
from opd_daemon.home import Home
from opd_daemon.plugins import LoadedPlugin, PluginRegistry
from opd_daemon.runs.attempt import Teaching
from opd_daemon.runs.manager import RunManager
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.runs.preflight import Preflight
from opd_daemon.runs.workers import Workers
from opd_daemon.store import Store
from opd_daemon.trainer import TrainerInfo
from opd_daemon.types import Event, EventKind, Plan, Run, RunState
from tests.asynchronous import until

STUB = r"""
import os, signal, subprocess, sys, time
what = sys.argv[1]
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what == "flood":
    for _ in range(300):
        print("x" * 100_000)
if what == "parent":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    print("child", child.pid)
print("environment", os.environ["OPD_ADDRESS"], os.environ["OPD_HOME"], os.environ["OPD_WORKER_TOKEN"])
print("ready", flush=True)
if what == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "bad_alloc":
    print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
    os.abort()
if what in ("fail", "flood", "parent"):
    sys.exit("boom: the last line")
if what == "silent":
    sys.exit(0)
if what == "stubborn":
    time.sleep(600)
sys.stdin.read()
"""
PLAN = Plan(10.0, 1, 2, 3, 4, ("assumed",), ("careful",))


def trainer_plugin(*, refuse: Callable[[Run], None] | None = None, on_policy: bool = False) -> LoadedPlugin:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)

    class Policy:
        @hookspecs.hookimpl
        def opd_before_run_started(self, run: Run) -> None:
            if refuse:
                refuse(run)

    manager.register(Policy())
    factory: Any = None
    trainer = TrainerInfo("on_policy", "1", "Trains.", factory, on_policy=on_policy)
    return LoadedPlugin("p", "opd-p", "1", ("opd_before_run_started",), ("on_policy",), 0.0, manager.hook, (trainer,))


@dataclass
class Stage:
    """Everything a test turns: what preflight finds, how the teacher loads, what workers do."""

    root: Path
    worker: str = "obedient"
    faults: list[FieldViolation] = field(default_factory=list)
    teacher: str = ""
    loads: list[str] = field(default_factory=list)
    load_fault: OpdError | None = None
    load_gate: asyncio.Event | None = None
    refuse: Callable[[Run], None] | None = None
    stop_grace: float = 20.0
    max_concurrent_runs: int = 1
    most_bytes: int = 10**12
    on_policy: bool = False
    plan: Plan = PLAN
    plan_requests: list[PlanRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = Home(self.root / "home")
        self.script = self.root / "stub_worker_main.py"
        self.script.write_text(STUB)

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """A daemon's lifetime: recovered at the start, closed at the end."""
        events = EventLog(Store(self.home.database))
        workers = Workers(
            self.home, address="unix:nowhere", command=(sys.executable, "-S", str(self.script), self.worker)
        )
        manager = RunManager(
            home=self.home,
            events=events,
            plugins=PluginRegistry([trainer_plugin(refuse=self.refuse, on_policy=self.on_policy)]),
            workers=workers,
            preflight=Preflight(self._check, self._plan),
            teaching=Teaching(lambda model: model == self.teacher, self._ensure),
            max_concurrent_runs=self.max_concurrent_runs,
            stop_grace=self.stop_grace,
            most_bytes=self.most_bytes,
        )
        await manager.recover()
        manager.start()
        try:
            yield Daemon(self, manager, events, workers)
        finally:
            await manager.close(grace=0.1)
            await events.aclose()

    def values(self, **changes: Any) -> dict[str, Any]:
        paths = {
            "base_model_path": "/m/student",
            "teacher_model_path": "/m/teacher",
            "prompts_path": "/d/prompts.jsonl",
        }
        return {**paths, "num_steps": 10, **changes}

    def _check(self, config: RunConfig, trainer: TrainerInfo | None) -> list[FieldViolation]:
        assert trainer is None or trainer.name == config.trainer
        return self.faults

    def _plan(self, request: PlanRequest) -> Plan:
        self.plan_requests.append(request)
        return self.plan

    async def _ensure(self, path: str) -> None:
        self.loads.append(path)
        if self.load_gate:
            await self.load_gate.wait()
        if self.load_fault:
            raise self.load_fault
        self.teacher = path


@dataclass
class Daemon:
    """A live manager with shorthands for tests."""

    stage: Stage
    runs: RunManager
    events: EventLog
    workers: Workers

    async def create(self, **changes: Any) -> str:
        return (await self.runs.create(self.stage.values(**changes))).run_id

    async def reach(self, run_id: str, state: RunState) -> Run:
        async def reached() -> bool:
            return (await self.runs.get(run_id)).state is state

        await until(reached)
        return await self.runs.get(run_id)

    async def start(self, **changes: Any) -> str:
        """A run whose worker is up and training."""
        run_id = await self.create(**changes)
        await self.worker_says(run_id, "ready")
        await self.runs.running(run_id)
        return run_id

    async def worker_says(self, run_id: str, text: str, times: int = 1) -> None:
        path = self.stage.home.run(run_id).worker_log

        async def said() -> bool:
            return path.exists() and path.read_text().count(text) >= times

        await until(said)

    async def states(self, run_id: str) -> list[str]:
        events, _ = await self.events.read(lambda store: store.events_after(0, run_id))
        return [event.payload["state"] for event in events if event.kind is EventKind.RUN_STATE]


def metrics(step: int, **changes: Any) -> Event:
    payload = {"step": step, "total_steps": 10, "loss": 1.0 / step, "seconds_remaining": 10.0 - step, **changes}
    return Event(EventKind.METRICS, "", payload, datetime.now(UTC))


def checkpoint(step: int, path: Path, **flags: Any) -> Event:
    payload = {"step": step, "path": str(path), "bytes": 1, "is_best": False, "is_final": False, **flags}
    return Event(EventKind.CHECKPOINT, "", payload, datetime.now(UTC))


def with_run(event: Event, run_id: str) -> Event:
    return replace(event, run_id=run_id)


def write_checkpoint(daemon: Daemon, run_id: str, step: int, best_step: int | None = None) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    def save(folder: Path) -> None:
        for name in ("adapters.safetensors", "optimizer.safetensors"):
            save_file({"x": np.zeros(1, np.float32)}, folder / name)
        (folder / "adapter_config.json").write_text("{}")

    progress = RunProgress(step=step, best_step=best_step)
    return Checkpoints(daemon.stage.home.run(run_id).checkpoints, keep_last=3).save_step(progress, save)
