"""The daemon's parts, put together once and taken apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.events import MAX_WATCHERS, EventLog
from opd_daemon.failpoints import hit
from opd_daemon.home import Home
from opd_daemon.paths import AllowedRoots
from opd_daemon.plugins import PluginRegistry
from opd_daemon.retention import Retention, retain
from opd_daemon.runs.attempt import Teaching
from opd_daemon.runs.comparison import Comparisons
from opd_daemon.runs.manager import RunManager
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.runs.preflight import Preflight
from opd_daemon.runs.stall import USUAL, StallPolicy
from opd_daemon.runs.states import LIVE
from opd_daemon.runs.uploads import Uploads
from opd_daemon.runs.workers import Workers
from opd_daemon.store import Store
from opd_daemon.teacher.folder import is_model
from opd_daemon.teacher.service import TeacherService
from opd_daemon.types import Event, EventKind, Plan, Run, TeacherState

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.runs.planner import Planner
    from opd_daemon.trainer import TrainerInfo

log = logging.getLogger(__name__)

PLUGIN_SECONDS = 5.0
LOADING_POLL_SECONDS = 0.2
# Between attempts to store what a full disk didn't take.
ANNOUNCE_SECONDS = 5.0
ALL_RUNS = 500


@dataclass(frozen=True, slots=True)
class Limits:
    """What one daemon may take: bytes of teacher cache and of runs, runs at a time, watches, kept events; its patience.

    stop_grace_seconds: for one that is to stop. stall: for one that doesn't get on.
    """

    cache_bytes: int
    run_bytes: int
    concurrent_runs: int
    stop_grace_seconds: float
    watchers: int = MAX_WATCHERS
    retention: Retention = field(default_factory=Retention)
    stall: StallPolicy = USUAL


class ResidentTeacher:
    """The teacher together with the log: whoever changes it, everybody hears of it."""

    def __init__(self, service: TeacherService, events: EventLog) -> None:
        self.service = service
        self._events = events
        self._announced: tuple[TeacherState, str] | None = None
        self._telling = asyncio.Lock()
        self._settling: asyncio.Task[None] | None = None

    def holds(self, model: str) -> bool:
        """Whether the model of this folder or hub id is loaded."""
        return is_model(self.service.info, model)

    async def ensure(self, path: str) -> None:
        """Load the teacher at `path` unless it is there, after any load under way. Raises what a load raises."""
        while not self.holds(path):
            try:
                async for _ in self.service.load(path):
                    pass
                return
            except OpdError as error:
                if error.reason is not Reason.TEACHER_LOADING:
                    raise
                await asyncio.sleep(LOADING_POLL_SECONDS)
            finally:
                await self.announce()

    async def announce(self, message: str = "") -> None:
        """Record the teacher's state as an event, if it has changed, and again when a load under way has ended.

        Raises:
            OpdError: it can't be stored; that is tried again until it is.
        """
        if self.service.loading:
            self._settle_later()  # who asked for the load may have gone
        # What counts as announced is what was stored, even if the caller gives up meanwhile.
        await asyncio.shield(self._tell(message))

    async def _tell(self, message: str = "") -> None:
        async with self._telling:
            info, failure = self.service.info, self.service.failure
            now = (self.service.state, info.digest if info else "")
            if now == self._announced:
                return
            payload = {
                "state": str(now[0]),
                "digest": now[1],
                "name": info.name if info else "",
                "message": message or (failure.message if failure else ""),
            }
            try:
                await self._events.append(None, [Event(EventKind.TEACHER, "", payload, datetime.now(UTC))])
            except OpdError:
                self._settle_later()
                raise
            self._announced = now

    def _settle_later(self) -> None:
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        """Announce how a load has ended, as soon as the store takes it."""
        while self.service.loading or not await self._told():
            await self.service.settled()
        self._settling = None

    async def _told(self) -> bool:
        """Whether everybody knows of the teacher by now; else after a pause."""
        try:
            await self._tell()
        except OpdError as fault:
            log.warning("that the teacher is %s can't be stored yet: %s", self.service.state, fault)
            await asyncio.sleep(ANNOUNCE_SECONDS)
            return False
        return not self.service.loading

    async def close(self) -> None:
        """Let the teacher go."""
        if self._settling:
            self._settling.cancel()
        await self.service.close()


class Outlook:
    """Checks and plans of runs; both block. What they take of `distill` is imported by the first run.

    beside: runs that may train at the same time as another.
    """

    def __init__(self, home: Home, roots: AllowedRoots, teacher: TeacherService, *, beside: int) -> None:
        self._home = home
        self._beside = beside
        self._roots = roots
        self._teacher = teacher
        self._opening = threading.Lock()

    def check(self, config: RunConfig, trainer: TrainerInfo | None) -> list[FieldViolation]:
        """As `distill.preflight.check_run`."""
        from opd_daemon.distill.preflight import check_run

        return check_run(config, trainer, self._roots)

    def plan(self, request: PlanRequest) -> Plan:
        """As `runs.planner.Planner.plan`."""
        with self._opening:
            planner = self._planner
        return planner.plan(request)

    @cached_property
    def _planner(self) -> Planner:
        from opd_daemon.runs.calibration import Calibrations
        from opd_daemon.runs.planner import Planner

        calibrations = Calibrations(self._home.calibration)
        return Planner(calibrations, self._home.root, self._teacher.cache_stats, beside=self._beside)


@dataclass(frozen=True, slots=True)
class Daemon:
    """Everything the services stand on."""

    home: Home
    events: EventLog
    plugins: PluginRegistry
    teacher: ResidentTeacher
    workers: Workers
    runs: RunManager
    comparisons: Comparisons
    uploads: Uploads

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, home: Home, limits: Limits, roots: AllowedRoots) -> AsyncIterator[Daemon]:
        """Open store, plugins and cache and start the teacher's thread; close all of it again at the end.

        roots: where clients may name paths.

        Raises:
            OpdError: the store is damaged or of a newer version.
        """
        events = EventLog(await asyncio.to_thread(Store, home.database), max_watchers=limits.watchers)
        plugins = await asyncio.to_thread(PluginRegistry.discover)
        for failed in plugins.failed:
            log.warning("plugin %s is not in use: %s", failed.name, failed.error)
        service = TeacherService(home.teacher_cache, home.digest_memo, cache_limit_bytes=limits.cache_bytes)
        await service.start()
        teacher = ResidentTeacher(service, events)
        outlook = Outlook(home, roots, service, beside=limits.concurrent_runs - 1)
        workers = Workers(home)
        runs = RunManager(
            home=home,
            events=events,
            plugins=plugins,
            workers=workers,
            preflight=Preflight(outlook.check, outlook.plan),
            teaching=Teaching(teacher.holds, teacher.ensure),
            max_concurrent_runs=limits.concurrent_runs,
            stop_grace=limits.stop_grace_seconds,
            stall=limits.stall,
            most_bytes=limits.run_bytes,
        )
        comparisons = Comparisons(home, events, workers=workers, runs=runs, teacher=service)
        uploads = Uploads(home.uploads)
        await asyncio.to_thread(uploads.remove_partial)
        retaining = asyncio.create_task(retain(events, home.database, limits.retention))
        try:
            yield cls(home, events, plugins, teacher, workers, runs, comparisons, uploads)
        finally:
            await teacher.close()
            retaining.cancel()
            await events.aclose()

    def begin(self, address: str) -> None:
        """From here on workers start and reach the daemon at `address`."""
        self.workers.address = address
        self.runs.start()

    async def end(self, grace: float) -> None:
        """Let workers write their checkpoints, then end the watches and say goodbye to the plugins."""
        await self.comparisons.close()
        await self.runs.close(grace)
        hit("drain.runs")
        self.events.close("the daemon stops; resume this watch when it is back")
        await asyncio.to_thread(self.plugins.daemon_stopping, PLUGIN_SECONDS)

    async def preload(self, teacher_path: str) -> None:
        """Load a teacher at start; a failure is logged and the daemon serves on."""
        try:
            await self.teacher.ensure(teacher_path)
        except OpdError as error:
            log.error("the teacher was not loaded: %s", error)  # noqa: TRY400 - the message says it all

    async def teacher_users(self) -> list[str]:
        """Runs that need the present teacher: all live ones, since runs with another teacher wait for them."""
        runs, _ = await self.runs.list(page_size=ALL_RUNS, states=LIVE)
        return [run.run_id for run in runs] or [name for name in [self.comparisons.run_id] if name]

    async def all_runs(self) -> list[Run]:
        """Every run there is."""
        runs: list[Run] = []
        token = ""
        while True:
            page, token = await self.runs.list(page_size=ALL_RUNS, page_token=token)
            runs += page
            if not token:
                return runs
