"""Runs as the rest of the daemon sees them: accept, schedule, stop, resume, delete, recover."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO, TypeVar

from opd_daemon.config import parse_config
from opd_daemon.distill.checkpoints import latest
from opd_daemon.errors import OpdError, Reason, invalid, violations_error
from opd_daemon.events import EventLog
from opd_daemon.failpoints import hit
from opd_daemon.home import Home
from opd_daemon.names import new_run_id
from opd_daemon.plugins import PluginRegistry
from opd_daemon.runs.acceptance import checked_config, request_digest
from opd_daemon.runs.attempt import RunServices, Teaching
from opd_daemon.runs.files import is_folder, names_on_disk, remove_files, tidy_up, write_waiting
from opd_daemon.runs.ledger import Ledger
from opd_daemon.runs.plans import PlanRequest, does_not_fit
from opd_daemon.runs.preflight import Preflight
from opd_daemon.runs.quota import MOST_BYTES, require_room
from opd_daemon.runs.reports import open_report, report_path
from opd_daemon.runs.resumption import Resumption
from opd_daemon.runs.scheduler import Scheduler
from opd_daemon.runs.stall import USUAL, StallPolicy
from opd_daemon.runs.states import LIVE, conflict, moved, state_event
from opd_daemon.runs.workers import Workers, end_orphan
from opd_daemon.store import Store
from opd_daemon.types import Checkpoint, Event, EventKind, Gauges, Run, RunState

logger = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 60.0

T = TypeVar("T")

# Inside the class, `list` is the method.
Runs = list[Run]
Payloads = list[dict[str, Any]]
Checkpoints = list[Checkpoint]
OpenFiles = list[BinaryIO]


class RunManager:
    """Every run of this daemon. They wait in PENDING in order of creation; `max_concurrent_runs` are done at a time.

    Call `recover` once before anything else and `close` at the end.
    """

    def __init__(
        self,
        *,
        home: Home,
        events: EventLog,
        plugins: PluginRegistry,
        workers: Workers,
        preflight: Preflight,
        teaching: Teaching,
        max_concurrent_runs: int = 1,
        stop_grace: float = STOP_GRACE_SECONDS,
        stall: StallPolicy = USUAL,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        ledger = Ledger(events, plugins)
        services = RunServices(home, events, plugins, workers, preflight, teaching, stop_grace, ledger, stall)
        self._home = home
        self._most_bytes = most_bytes
        self._events = events
        self._plugins = plugins
        self._workers = workers
        self._preflight = preflight
        self._teaching = teaching
        self._ledger = ledger
        self._scheduler = Scheduler(services, max_concurrent_runs)
        self._accepting = asyncio.Lock()
        self._closing = False
        events.add_listener(self._tell_plugins)

    def _tell_plugins(self, events: Sequence[Event]) -> None:
        for event in events:
            self._plugins.notify_event(event)

    # Runs

    async def create(
        self,
        values: dict[str, Any],
        *,
        request_id: str = "",
        validate_only: bool = False,
        machine: str = "",
        force: bool = False,
    ) -> Run:
        """Check, plan and accept a run; `run.plan` says what it will take and what to beware of.

        A request that comes again with the same `request_id` answers with the same run. With `validate_only` nothing is
        kept, and the run has no run_id unless one was given; only then may the plan be for another `machine`, and this
        one is measured if that wasn't done yet and no run is live. `force` accepts a run that won't fit.

        Raises:
            OpdError: INVALID_RUN_CONFIG with every fault, RUN_REFUSED, REQUEST_ID_REUSED, DISK_FULL, SHUTTING_DOWN;
                INVALID_REQUEST for a machine nobody knows; OUT_OF_MEMORY for a run that won't fit.
        """
        self._refuse_when_closing()
        digest = request_digest(values)
        if validate_only and not await self._events.read(lambda store: store.run_by_request_id(request_id, digest)):
            # It may measure the machine for half a minute, which nobody else has to wait for.
            return await self._planned(values, request_id, validate_only, machine)
        async with self._accepting:
            earlier = await self._events.read(lambda store: store.run_by_request_id(request_id, digest))
            if earlier is not None:
                return earlier.run
            run = await self._planned(values, request_id, validate_only, machine)
            unfinished = await self._events.read(lambda store: store.list_runs({RunState.PENDING, *LIVE}, limit=-1))
            others = [stored.run for stored in unfinished]
            await asyncio.to_thread(require_room, self._home, run.plan, others, self._most_bytes)
            if run.plan and not run.plan.fits and not force:
                raise does_not_fit(run.plan)
            return await _seen_through(self._accept(run, digest))

    async def _planned(self, values: dict[str, Any], request_id: str, validate_only: bool, machine: str) -> Run:
        if machine and not validate_only:
            raise invalid("machine", f"{machine!r}: a run can be planned for another machine only with validate_only")
        taken = await self._events.read(lambda store: store.run_ids())
        taken |= await asyncio.to_thread(names_on_disk, self._home)
        config = await checked_config(values, self._plugins, self._preflight, taken)
        resident = self._teaching.holds(config.teacher_model_path)
        idle = not await self._events.read(lambda store: store.list_runs(LIVE, limit=1))
        request = PlanRequest(
            config, self._plugins.trainer(config.trainer), resident, machine, measure=validate_only and idle
        )
        plan = await self._preflight.plan(request)
        run = Run(
            run_id=config.run_id,
            state=RunState.PENDING,
            config=config.model_dump(mode="json"),
            created_at=datetime.now(UTC),
            request_id=request_id,
            session_id=config.session_id,
            total_steps=config.num_steps,
            plan=plan,
        )
        await asyncio.to_thread(self._plugins.before_run_started, run)
        return run

    async def _accept(self, run: Run, digest: str) -> Run:
        taken = await self._events.read(lambda store: store.run_ids())
        taken |= await asyncio.to_thread(names_on_disk, self._home)
        run_id = run.run_id or new_run_id(datetime.now().astimezone(), taken)
        run = replace(run, run_id=run_id, config={**run.config, "run_id": run_id})
        path = self._home.run(run_id).config
        waiting = await asyncio.to_thread(write_waiting, path, parse_config(run.config).to_yaml())
        hit("run.accept.config")
        try:
            await self._events.commit(lambda store: store.insert_run(run, [state_event(run)], digest))
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise
        hit("run.accept.stored")
        waiting.replace(path)
        self._scheduler.wake()
        return run

    async def get(self, run_id: str) -> Run:
        """The run. Raises RUN_NOT_FOUND."""
        return self._with_report(await self._ledger.get(run_id))

    async def list(
        self, *, page_size: int = 50, page_token: str = "", states: Collection[RunState] = ()
    ) -> tuple[Runs, str]:
        """Runs, newest first, and the token of the next page, empty on the last.

        Raises:
            OpdError: INVALID_PAGE_TOKEN.
        """
        if page_token and not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 19):
            raise invalid("page_token", "not a token this daemon gave out", Reason.INVALID_PAGE_TOKEN)
        before = int(page_token) if page_token else None
        found = await self._events.read(lambda store: store.list_runs(states, limit=page_size + 1, before=before))
        page = found[:page_size]
        runs = [self._with_report(stored.run) for stored in page]
        return runs, str(page[-1].revision) if len(found) > page_size else ""

    def _with_report(self, run: Run) -> Run:
        return replace(run, report_path=report_path(self._home, run))

    async def stop(self, run_id: str) -> Run:
        """Ask a run to stop: a PENDING one ends at once, a live one writes a checkpoint first. Twice is once.

        Raises:
            OpdError: RUN_NOT_FOUND; RUN_STATE_CONFLICT when the run is resting.
        """

        def decide(run: Run) -> tuple[Run, Event] | None:
            if run.state.resting:
                raise conflict(run, "has nothing to stop")
            if run.state is RunState.STOPPING:
                return None
            return moved(run, RunState.STOPPED if run.state is RunState.PENDING else RunState.STOPPING)

        async def store_it() -> Run:
            run = await self._ledger.change(run_id, decide)
            hit("run.stop.stored")
            if run.state is RunState.STOPPING and (attempt := self._scheduler.attempt(run_id)):
                attempt.stop()
            return run

        return await _seen_through(store_it())

    async def resume(self, run_id: str) -> tuple[Run, int]:
        """Take a resting run up again from its newest checkpoint; also returns the step it goes on from.

        Raises:
            OpdError: RUN_NOT_FOUND; RUN_STATE_CONFLICT for a live or SUCCEEDED run; INVALID_RUN_CONFIG when what it
                needs is not there any more; SHUTTING_DOWN.
        """
        self._refuse_when_closing()
        run = await self._ledger.get(run_id)
        self._refuse_unless_resumable(run)
        await self._check_again(run)
        resumption = await asyncio.to_thread(Resumption.find, self._home.run(run_id))
        step = resumption.progress.step

        def decide(run: Run) -> tuple[Run, Event]:
            self._refuse_unless_resumable(run)
            again = replace(resumption.rewound(run), attempt=run.attempt + 1)
            return moved(again, RunState.PENDING, message=f"resumed from step {step}")

        async def store_it() -> Run:
            run = await self._ledger.change(run_id, decide, lambda store: store.rewind(run_id, step))
            hit("run.resume.stored")
            self._scheduler.wake()
            return run

        return await _seen_through(store_it()), step

    async def _check_again(self, run: Run) -> None:
        config = parse_config(run.config)
        violations = await self._preflight.run(self._preflight.check, config, self._plugins.trainer(config.trainer))
        if violations:
            raise violations_error(violations, Reason.INVALID_RUN_CONFIG)

    def _refuse_unless_resumable(self, run: Run) -> None:
        if not run.state.resumable:
            raise conflict(run, "can't be resumed")

    async def delete(self, run_id: str) -> None:
        """Remove a resting run and its files. Its events stay in the log, which never has gaps.

        Raises:
            OpdError: RUN_NOT_FOUND; RUN_STATE_CONFLICT for a run that is pending or live.
        """

        def action(store: Store) -> None:
            run = store.get_run(run_id)
            if not run.state.resting:
                raise conflict(run, "can't be deleted; stop it first")
            store.delete_run(run_id)

        if self._scheduler.holder == run_id:
            message = f"run {run_id!r}: its models are being compared; wait until that is done"
            raise OpdError(Reason.RUN_STATE_CONFLICT, message, run_id=run_id)
        if (await self.get(run_id)).state.resting:
            await self._scheduler.wait(run_id)
        await self._events.commit(action)
        await _seen_through(self._remove_deleted(run_id))

    async def _remove_deleted(self, run_id: str) -> None:
        """Remove the files of a run the store has forgotten."""
        hit("run.delete.stored")
        await asyncio.to_thread(remove_files, self._home, run_id)
        await self._events.commit(lambda store: store.forget_deleted(run_id))

    @asynccontextmanager
    async def alone(self, run_id: str) -> AsyncIterator[None]:
        """Keep the machine's place for heavy work for something else with this run: no run starts meanwhile.

        Raises:
            OpdError: RUN_STATE_CONFLICT while it is taken; SHUTTING_DOWN.
        """
        self._refuse_when_closing()
        for other in self._scheduler.busy():
            # A worker that has reported its outcome is about to go.
            if (await self._ledger.get(other)).state.resting:
                await self._scheduler.wait(other)
        with self._scheduler.held(run_id):
            yield

    # What belongs to a run

    async def metrics(
        self, run_id: str, *, after_step: int = -1, limit: int = 1000, stride: int = 1
    ) -> tuple[Payloads, bool]:
        """METRICS payloads by step, every `stride`-th with the first and the last, and whether there are more."""
        await self._ledger.get(run_id)
        found = await self._events.read(
            lambda store: store.metrics(
                run_id, EventKind.METRICS, after_step=after_step, limit=limit + 1, stride=stride
            )
        )
        return [event.payload for event in found[:limit]], len(found) > limit

    async def evaluations(self, run_id: str) -> Payloads:
        """All EVALUATION payloads of a run, by step."""
        await self._ledger.get(run_id)
        found = await self._events.read(lambda store: store.metrics(run_id, EventKind.EVALUATION, limit=-1))
        return [event.payload for event in found]

    async def checkpoints(self, run_id: str) -> Checkpoints:
        """Checkpoints that are on disk now, oldest first."""
        await self._ledger.get(run_id)
        found = await self._events.read(lambda store: store.checkpoints(run_id))
        return await asyncio.to_thread(lambda: [entry for entry in found if is_folder(entry.path)])

    async def open_report(self, run_id: str) -> OpenFiles:
        """The report's page and its pictures. Raises as `reports.open_report`, and RUN_NOT_FOUND."""
        run = await self._ledger.get(run_id)
        return await asyncio.to_thread(open_report, self._home, run)

    # What workers say

    def run_for_token(self, token: str) -> str | None:
        """The run whose worker holds this token; None when no live worker does."""
        return self._workers.run_for_token(token)

    async def assignment(self, run_id: str) -> tuple[Run, str]:
        """The run, and the folder of the checkpoint to go on from, empty for the start."""
        run = await self._ledger.get(run_id)
        checkpoint = await asyncio.to_thread(latest, self._home.run(run_id).checkpoints)
        return run, str(checkpoint or "")

    async def running(self, run_id: str) -> None:
        """The worker trains now. A run that is STOPPING already stays so."""
        await self._ledger.change(
            run_id, lambda run: None if run.state is RunState.STOPPING else moved(run, RunState.RUNNING)
        )

    async def report(self, run_id: str, *events: Event) -> int:
        """Store events of a run's worker; returns the revision of the last."""
        revision = await self._ledger.report(run_id, *events)
        self._progressed(run_id)
        return revision

    def read_gauges(self, gauges: Gauges) -> None:
        """Readings of a run's worker; empty ones are a mere sign of life."""
        self._events.publish_gauges(gauges)
        if gauges.values:
            self._progressed(gauges.run_id)

    def _progressed(self, run_id: str) -> None:
        if attempt := self._scheduler.attempt(run_id):
            attempt.progressed()

    async def finish(
        self, run_id: str, state: RunState, *, error_reason: str = "", error_message: str = "", adapter_path: str = ""
    ) -> Run:
        """The worker's outcome. INTERRUPTED by OUT_OF_MEMORY is no end yet: the attempt may go on in less memory.

        Raises:
            OpdError: RUN_STATE_CONFLICT when the run can't end so.
        """
        attempt = self._scheduler.attempt(run_id)
        if attempt and (state, error_reason) == (RunState.INTERRUPTED, Reason.OUT_OF_MEMORY):
            attempt.memory_ran_out()
            return await self._ledger.get(run_id)
        if attempt and state is RunState.STOPPED:
            state, error_reason, error_message = attempt.stopped()
        changes = {"adapter_path": adapter_path} if adapter_path else {}
        run = await self._ledger.enter(run_id, state, message=error_message, error_reason=error_reason, **changes)
        if attempt:
            attempt.finished()
        return run

    # From start to end

    async def recover(self) -> None:
        """Take up what an earlier daemon left: end its workers, mark its live runs INTERRUPTED. Before anyone asks."""
        orphans = await self._events.read(lambda store: store.workers())
        await asyncio.gather(*(asyncio.to_thread(end_orphan, worker, self._home) for worker in orphans))
        hit("recover.orphans")
        for worker in orphans:
            await self._events.commit(partial(Store.forget_worker, run_id=worker.run_id))
        await self._finish_writing()
        for stored in await self._events.read(lambda store: store.list_runs(LIVE, limit=-1)):
            message = "the daemon ended without stopping the run; resume goes on from the last checkpoint"
            await self._ledger.enter(
                stored.run.run_id, RunState.INTERRUPTED, message=message, error_reason=Reason.DAEMON_DIED
            )
            hit("recover.interrupted")

    def start(self) -> None:
        """Start scheduling: from here on workers are started."""
        self._scheduler.start()

    async def _finish_writing(self) -> None:
        """Finish or undo what was under way in the files when the earlier daemon ended."""
        known = await self._events.read(lambda store: store.run_ids())
        spellings = {run_id.casefold() for run_id in known}
        for run_id in await self._events.read(lambda store: store.deleted_runs()):
            if run_id.casefold() not in spellings:
                await self._remove_deleted(run_id)
        await asyncio.to_thread(tidy_up, self._home, known)

    async def close(self, grace: float = STOP_GRACE_SECONDS) -> None:
        """Stop scheduling and let live runs write a checkpoint, for up to `grace` seconds; they end INTERRUPTED."""
        self._closing = True
        await self._scheduler.close(grace)
        self._preflight.close()

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise OpdError(Reason.SHUTTING_DOWN, "the daemon stops; try again when it is back")


async def _seen_through(work: Coroutine[Any, Any, T]) -> T:
    """Do work to its end even if the caller gives up: what is stored has to be acted on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
