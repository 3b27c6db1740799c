"""One attempt at a run: prepare, load the teacher, start the worker, see it through to the end.

A worker whose memory ran out is followed by another with smaller micro-batches, from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from os.path import realpath
from pathlib import Path
from typing import Any, TypeVar

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.errors import OpdError, Reason, violations_error
from opd_daemon.events import EventLog
from opd_daemon.failpoints import hit
from opd_daemon.home import Home
from opd_daemon.logs import run_id
from opd_daemon.plugins import PluginRegistry
from opd_daemon.runs.ledger import Ledger
from opd_daemon.runs.memory import kills_for_memory, memory_ended
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.runs.preflight import Preflight
from opd_daemon.runs.resumption import Resumption
from opd_daemon.runs.stall import USUAL, StallClock, StallPolicy
from opd_daemon.runs.states import TRANSITIONS, moved
from opd_daemon.runs.workers import WorkerProcess, Workers, meaning_of_exit
from opd_daemon.types import Event, EventKind, Run, RunState

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A worker that has reported its outcome has nothing left to do.
GOODBYE_SECONDS = 10.0
DISK_RETRY_SECONDS = 5.0
OVERSLEPT_SECONDS = 1.0
# What the store says when it can't be written to, which may pass.
UNSTORED = frozenset({Reason.DISK_FULL, Reason.STORE_UNUSABLE, Reason.INTERNAL})
# An eighth of a micro-batch that doesn't fit won't be saved by a sixteenth.
MOST_HALVINGS = 3


@dataclass(frozen=True, slots=True)
class Teaching:
    """The resident teacher: whether it `holds` the model of a path; `ensure` loads another if need be."""

    holds: Callable[[str], bool]
    ensure: Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RunServices:
    """What runs need of the daemon. `stop_grace` is how long a worker may take to write its checkpoint, in seconds."""

    home: Home
    events: EventLog
    plugins: PluginRegistry
    workers: Workers
    preflight: Preflight
    teaching: Teaching
    stop_grace: float
    ledger: Ledger
    stall: StallPolicy = USUAL


class _Ended(Exception):
    """The run was stopped before its worker started."""


class Attempt:
    """Carries a run from PENDING to rest."""

    def __init__(self, run: Run, services: RunServices) -> None:
        self.run_id = run.run_id
        self.teacher = teacher_folder(run)
        self._values = run.config
        self._services = services
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._deadline: float | None = None
        self._shutting_down = False
        self._overdue = False
        self._stalled = False
        self._memory_ran_out = False
        self._stall: StallClock | None = None

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration, read when the run has begun: one that another version wrote fails it alone.

        Raises:
            OpdError: INVALID_RUN_CONFIG.
        """
        return parse_config(self._values)

    async def carry_out(self) -> None:
        """Do it all; the run is at rest afterwards, whatever happened."""
        run_id.set(self.run_id)
        try:
            await self._prepare()
            await self._work()
        except _Ended:
            await self._come_to_rest(*self.stopped())
        except OpdError as fault:
            await self._come_to_rest(RunState.FAILED, fault.reason, " ".join(str(fault).split()))
        except Exception:
            logger.exception("run %s: the daemon failed", self.run_id)
            await self._come_to_rest(RunState.FAILED, Reason.INTERNAL, "the daemon failed; its log has the details")

    def stop(self) -> None:
        """The run is STOPPING: give the worker its grace, then end it."""
        self._stopping.set()
        self._hurry(self._services.stop_grace)

    def shut_down(self, grace: float) -> None:
        """The daemon goes: like `stop`, but the run can be resumed as if nothing had been asked."""
        self._shutting_down = not self._stopping.is_set()
        self._stopping.set()
        self._hurry(grace)

    def finished(self) -> None:
        """The worker has reported its outcome and will go."""
        self._hurry(GOODBYE_SECONDS)

    def progressed(self) -> None:
        """The worker has got somewhere: it has said something."""
        if self._stall:
            self._stall.progressed(asyncio.get_running_loop().time())

    def memory_ran_out(self) -> None:
        """The worker has found no memory, has saved what it could, and will go."""
        self._memory_ran_out = True
        self._hurry(GOODBYE_SECONDS)

    def stopped(self) -> tuple[RunState, str, str]:
        """State, reason and message of a run that stopped when its worker was asked to."""
        if self._stalled:
            minutes = self._services.stall.limit / 60.0
            message = f"no progress for {minutes:.1f} minutes; the worker was ended, resume starts from the checkpoint"
            return RunState.INTERRUPTED, Reason.WORKER_DIED, message
        if self._shutting_down:
            return RunState.INTERRUPTED, Reason.SHUTTING_DOWN, "the daemon was stopped; resume goes on from here"
        return RunState.STOPPED, "", ""

    async def _prepare(self) -> None:
        await self._begin()
        trainer = self._services.plugins.trainer(self.config.trainer)
        preflight = self._services.preflight
        violations = await preflight.run(preflight.check, self.config, trainer)
        if violations:
            raise violations_error(violations, Reason.INVALID_RUN_CONFIG)
        resident = self._services.teaching.holds(self.config.teacher_model_path)
        request = PlanRequest(self.config, trainer, resident)
        plan = await preflight.plan(request)
        if not plan.fits:  # accepted when there was more room, or by force
            await self._say(f"the run may not fit any more: {'; '.join(plan.warnings)}", "warning")
        if not resident:
            await self._say(f"loading the teacher {Path(self.config.teacher_model_path).name}")
        await self._unless_stopped(self._services.teaching.ensure(self.config.teacher_model_path))
        await self._enter(RunState.LOADING, plan=plan)

    async def _begin(self) -> None:
        """Leave PENDING; a run that has not begun can't fail, so a disk that takes nothing is waited for."""
        while True:
            try:
                return await self._enter(RunState.PLANNING)
            except OpdError as fault:
                if fault.reason not in UNSTORED:
                    raise
                logger.warning("run %s can't begin yet: %s", self.run_id, fault)
            await self._unless_stopped(asyncio.sleep(DISK_RETRY_SECONDS))

    async def _say(self, text: str, level: str = "info") -> None:
        event = Event(EventKind.LOG, self.run_id, {"level": level, "text": text}, datetime.now(UTC))
        await self._services.ledger.report(self.run_id, event)

    async def _enter(self, state: RunState, **changes: Any) -> None:
        try:
            await self._services.ledger.enter(self.run_id, state, **changes)
        except OpdError as fault:
            # Only a stop moves the run under our feet.
            if fault.reason is Reason.RUN_STATE_CONFLICT:
                raise _Ended from None
            raise

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        task, stop = asyncio.ensure_future(work), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Ended
            return task.result()
        finally:
            stop.cancel()
            # Loading goes on in the teacher's own thread; nobody waits for it here any more.
            task.cancel()

    async def _work(self) -> None:
        while await self._work_once():
            pass

    async def _work_once(self) -> bool:
        """One worker, to its end; whether another one goes on where its memory ran out."""
        kills = kills_for_memory()
        try:
            worker = await self._services.workers.start(self.run_id)
        except OSError as fault:
            message = f"the worker can't be started: {fault.strerror or fault}"
            raise OpdError(Reason.WORKER_DIED, message) from fault
        try:
            record = worker.record()
            hit("worker.started")
            await self._services.events.commit(lambda store: store.put_worker(record))
            hit("worker.recorded")
            worker.release()
            code = await self._see_through(worker)
            return await self._after_exit(worker, code, kills_for_memory() - kills)
        finally:
            await worker.terminate()
            self._services.workers.discharge(worker)
            await self._services.events.commit(lambda store: store.forget_worker(self.run_id))
            hit("worker.forgotten")

    async def _see_through(self, worker: WorkerProcess) -> int:
        ended = asyncio.create_task(worker.wait())
        self._stall = StallClock(self._services.stall, asyncio.get_running_loop().time())
        while not ended.done():
            self._hurried.clear()
            hurried = asyncio.create_task(self._hurried.wait())
            due, asked = self._patience(), asyncio.get_running_loop().time()
            await asyncio.wait({ended, hurried}, timeout=due, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            if ended.done():
                break
            if due is not None and asyncio.get_running_loop().time() - asked > due + OVERSLEPT_SECONDS:
                # This process itself was stopped, and what the worker said meanwhile is not read yet.
                self.progressed()
            await self._watch_progress(self._stall)
            self._overdue = self._seconds_left() == 0.0
            if self._overdue or self._stalled:
                await worker.terminate()
                await asyncio.wait({ended})
        hit("worker.ended")
        return ended.result()

    def _patience(self) -> float | None:
        """Seconds until something is due, if the worker says nothing; None when nothing will be."""
        if self._deadline is not None or self._stall is None:
            return self._seconds_left()
        return self._stall.seconds_left(asyncio.get_running_loop().time())

    async def _watch_progress(self, stall: StallClock) -> None:
        """Say that the run stalls, or decide that its worker has had its time."""
        now = asyncio.get_running_loop().time()
        if self._deadline is not None:
            return
        self._stalled = stall.is_over(now)
        if stall.warns(now):
            minutes = stall.silence(now) / 60.0
            text = f"no progress for {minutes:.1f} minutes; 'opd stop {self.run_id}' ends the run, resume takes it up"
            try:
                await self._say(text, "warning")
            except OpdError as fault:
                logger.warning("run %s: %s (not stored: %s)", self.run_id, text, fault)

    def _hurry(self, seconds: float) -> None:
        """From now on the worker has so many seconds at most."""
        deadline = asyncio.get_running_loop().time() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        self._hurried.set()

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - asyncio.get_running_loop().time(), 0.0)

    async def _after_exit(self, worker: WorkerProcess, code: int, kills: int) -> bool:
        if self._stalled:
            await self._come_to_rest(*self.stopped())
            return False
        if self._overdue and not self._memory_ran_out:
            message = "the worker did not stop in time and was ended; resume goes on from the last checkpoint"
            await self._come_to_rest(RunState.INTERRUPTED, Reason.WORKER_DIED, message)
            return False
        limited = self.config.worker_memory_limit_bytes > 0
        if self._memory_ran_out or memory_ended(code, worker.log.last_words(), limited=limited, kills=kills):
            return await self._go_on_in_less_memory()
        meaning = meaning_of_exit(code, worker.log.last_line())
        await self._come_to_rest(meaning.state, meaning.reason, meaning.message)
        return False

    async def _go_on_in_less_memory(self) -> bool:
        """Halve the micro-batches and go back to the last checkpoint, if that is possible; else the run rests."""
        run = await self._services.ledger.get(self.run_id)
        size = max(1, self.config.batch_size >> run.memory_halvings)
        if max(size, self._sampled_together() >> run.memory_halvings) <= 1 or run.memory_halvings >= MOST_HALVINGS:
            await self._come_to_rest(RunState.FAILED, Reason.OUT_OF_MEMORY, _does_not_fit(size))
            return False
        resumption = await asyncio.to_thread(Resumption.find, self._services.home.run(self.run_id))
        step, halvings = resumption.progress.step, run.memory_halvings + 1
        text = f"memory ran out: going on from step {step} with micro-batches of {max(1, size // 2)}"
        self._memory_ran_out = self._overdue = False
        if not self._stopping.is_set():
            self._deadline = None

        def decide(run: Run) -> tuple[Run, Event] | None:
            if self._stopping.is_set() or RunState.LOADING not in TRANSITIONS[run.state]:
                return None
            smaller = replace(resumption.rewound(run), memory_halvings=halvings)
            return moved(smaller, RunState.LOADING, message=text)

        run = await self._services.ledger.change(self.run_id, decide, lambda store: store.rewind(self.run_id, step))
        if run.memory_halvings != halvings:
            message = "memory ran out when the run was to stop; resume goes on from the last checkpoint"
            await self._come_to_rest(RunState.INTERRUPTED, Reason.OUT_OF_MEMORY, message)
            return False
        await self._say(text, "warning")
        # A worker that had everything computed first has unloaded the teacher; the next one begins with it again.
        await self._unless_stopped(self._services.teaching.ensure(self.config.teacher_model_path))
        return True

    def _sampled_together(self) -> int:
        """Sequences the student samples at once, which can be fewer too; 1 where it samples none."""
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps
        return sequences if self._services.plugins.trainer(self.config.trainer).on_policy else 1

    async def _come_to_rest(self, state: RunState, reason: str, message: str) -> None:
        while True:
            try:
                await self._services.ledger.change(
                    self.run_id,
                    # What the worker reported itself stands, and what never began stays as it is.
                    lambda run: (
                        None
                        if run.state.resting or run.state is RunState.PENDING
                        else moved(run, state, message=message, error_reason=reason)
                    ),
                )
                return
            except OpdError as fault:
                if fault.reason not in UNSTORED or self._shutting_down:
                    raise
                logger.warning("run %s is %s, but that can't be stored yet: %s", self.run_id, state, fault)
                await asyncio.sleep(DISK_RETRY_SECONDS)


def teacher_folder(run: Run) -> str:
    """The folder a run's teacher is in, by whatever links."""
    path = str(run.config.get("teacher_model_path", ""))
    try:
        return realpath(path)
    except ValueError:  # what no disk takes for a path; the run fails when it is its turn
        return path


def _does_not_fit(size: int) -> str:
    sequences = "one sequence" if size == 1 else f"{size} sequences"
    return (
        f"memory ran out in a training step with micro-batches of {sequences}; use backward 'layerwise', a smaller "
        "max_generation_tokens, max_prompt_tokens or lora.rank, or a quantised base, or give the worker more memory"
    )
