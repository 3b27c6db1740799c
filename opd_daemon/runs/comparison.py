"""Comparisons of a run's models, one at a time, never beside a run that trains."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill.checkpoints import latest
from opd_daemon.distill.data import with_system_prompt
from opd_daemon.errors import FieldViolation, OpdError, Reason, violations_error
from opd_daemon.events import EventLog
from opd_daemon.home import Home
from opd_daemon.names import COMPARED_MODELS
from opd_daemon.runs.manager import RunManager
from opd_daemon.runs.memory import kills_for_memory, memory_ended
from opd_daemon.runs.workers import WorkerProcess, Workers, meaning_of_exit
from opd_daemon.teacher.folder import is_model
from opd_daemon.teacher.service import TeacherService
from opd_daemon.teacher.speculation import Speculated, Speculation, check_draft
from opd_daemon.teacher.tokenizer import TextTokenizer
from opd_daemon.textstream import TextStream
from opd_daemon.types import ComparisonRequest, ModelAnswer, ModelSummary, Run
from opd_daemon.vocabulary import compare_vocabularies, ids_below, load_vocabulary

COMMAND = (sys.executable, "-m", "opd_daemon.runs.compare_main")
QUEUED_ANSWERS = 1000
MOST_PROMPTS = 100
# A caller that doesn't read can't be told.
CLOSE_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the worker of a comparison does. adapter_path: the distilled adapter, empty where it isn't needed."""

    request: ComparisonRequest
    adapter_path: str


class Relay:
    """What the worker says, on its way to the caller; the caller's pace is the worker's."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self._said: asyncio.Queue[ModelAnswer | OpdError] = asyncio.Queue(QUEUED_ANSWERS)
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def say(self, word: ModelAnswer | OpdError) -> None:
        """The worker's next word; an error is its last."""
        await self._said.put(word)

    def close(self) -> None:
        """The daemon stops: nothing more is heard."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def hear(self, ended: asyncio.Future[int]) -> ModelAnswer | OpdError | int:
        """The next word, or the exit code of a worker that has ended and said no more."""
        word = asyncio.ensure_future(self._said.get())
        first: set[asyncio.Future[Any]] = {word, ended, self._closed}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if self._closed.done():
                return _shutting_down()
            # What it said before it ended comes first.
            await asyncio.sleep(0)
            return word.result() if word.done() else ended.result()
        finally:
            word.cancel()


class Comparisons:
    """Starts comparisons and brings their answers to the caller. `run_id` names the run under way, else empty."""

    def __init__(
        self, home: Home, events: EventLog, *, workers: Workers, runs: RunManager, teacher: TeacherService
    ) -> None:
        self._home = home
        self._events = events
        self._workers = workers
        self._runs = runs
        self._teacher = teacher
        self._relay: Relay | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    @property
    def run_id(self) -> str:
        """The run whose models are compared now; empty when none are."""
        return self._relay.assignment.request.run_id if self._relay else ""

    def relay(self, run_id: str) -> Relay | None:
        """Where the worker of this run's comparison speaks; None when there is no such comparison."""
        return self._relay if self._relay and self.run_id == run_id else None

    async def close(self) -> None:
        """End the comparison under way; its caller is told that the daemon stops, if it still reads."""
        self._closing = True
        if self._relay:
            self._relay.close()
        # Not by cancelling the call: a cancelled write to a slow caller never lets the generator speak.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), CLOSE_SECONDS)

    async def compare(self, request: ComparisonRequest) -> AsyncGenerator[ModelAnswer, None]:
        """Every piece of every answer as it comes. Leaving the iteration ends all work.

        Raises:
            OpdError: RUN_NOT_FOUND, CHECKPOINT_NOT_FOUND, INVALID_REQUEST, TEACHER_NOT_LOADED, TEACHER_CHANGED;
                RUN_STATE_CONFLICT while a run trains or another comparison goes on; OUT_OF_MEMORY, WORKER_DIED.
        """
        run = await self._runs.get(request.run_id)
        config = parse_config(run.config)
        assignment = await asyncio.to_thread(self._assignment, run, config, request)
        self._check_teacher(config)
        if request.speculative:
            await asyncio.to_thread(check_draft, Path(config.base_model_path))
        async with self._runs.alone(run.run_id):
            self._relay = Relay(assignment)
            self._idle.clear()
            try:
                teacher_speed = None
                async with aclosing(self._models(self._relay)) as answers:
                    async for answer in answers:
                        if answer.model == "teacher" and answer.summary:
                            teacher_speed = answer.summary.tokens_per_second
                        yield answer
                if request.speculative:
                    async with aclosing(self._speculative(config, assignment, teacher_speed)) as answers:
                        async for answer in answers:
                            yield answer
            finally:
                self._relay = None
                self._idle.set()

    def _assignment(self, run: Run, config: RunConfig, request: ComparisonRequest) -> Assignment:
        """The request with its defaults filled in, and the adapter it needs; blocks."""
        if faults := list(_faults(request, config)):
            raise violations_error(faults)
        has = [name for name in COMPARED_MODELS if name != "sft" or config.student_adapter_path]
        models = tuple(name for name in COMPARED_MODELS if name in (request.models or has))
        adapter = ""
        if "distilled" in models or request.speculative:
            adapter = str(distilled_adapter(self._home.run(run.run_id).checkpoints) or "")
            if not adapter:
                message = f"run {run.run_id!r} has no adapter yet; 'opd status' shows its checkpoints"
                raise OpdError(Reason.CHECKPOINT_NOT_FOUND, message, run_id=run.run_id)
        max_tokens = request.max_tokens or config.max_generation_tokens
        return Assignment(replace(request, models=models, max_tokens=max_tokens), adapter)

    def _check_teacher(self, config: RunConfig) -> None:
        path = config.teacher_model_path
        info = self._teacher.info
        if info is None:
            message = f"no teacher is loaded; load the run's with 'opd teacher load {path}'"
            raise OpdError(Reason.TEACHER_NOT_LOADED, message, path=path)
        if not is_model(info, path):
            message = f"the teacher loaded is {info.name}, not the run's; load that with 'opd teacher load {path}'"
            raise OpdError(Reason.TEACHER_CHANGED, message, path=path)

    async def _models(self, relay: Relay) -> AsyncGenerator[ModelAnswer, None]:
        """What the worker says, until the last model's summary: a stream that ends may have been cut off."""
        await self._teacher.reset_peak_memory()
        kills = kills_for_memory()
        try:
            worker = await self._workers.start(self.run_id, command=COMMAND)
        except OSError as fault:
            raise OpdError(Reason.WORKER_DIED, f"the worker can't be started: {fault.strerror or fault}") from fault
        record = worker.record()
        ended = asyncio.ensure_future(worker.wait())
        try:
            await self._events.commit(lambda store: store.put_worker(record))
            worker.release()
            missing = set(relay.assignment.request.models)
            while missing:
                word = await relay.hear(ended)
                if isinstance(word, OpdError):
                    raise word
                if isinstance(word, int):
                    raise _death(worker, word, kills_for_memory() - kills)
                if word.summary:
                    missing.discard(word.model)
                yield await self._with_teachers_peak(word)
        finally:
            await worker.terminate()
            await ended
            self._workers.discharge(worker)
            await self._events.commit(lambda store: store.forget_worker(record.run_id))

    async def _with_teachers_peak(self, answer: ModelAnswer) -> ModelAnswer:
        """The worker can't see how much memory the teacher took."""
        if answer.model != "teacher" or answer.summary is None:
            return answer
        return replace(answer, summary=replace(answer.summary, peak_bytes=await self._teacher.peak_memory()))

    async def _speculative(
        self, config: RunConfig, assignment: Assignment, teacher_speed: float | None
    ) -> AsyncGenerator[ModelAnswer, None]:
        info = self._teacher.info
        if info is None:
            raise OpdError(Reason.TEACHER_CHANGED, "the teacher was unloaded; compare again")
        request = assignment.request
        job = Speculation(
            base=Path(config.base_model_path),
            adapter=Path(assignment.adapter_path),
            prompts=await asyncio.to_thread(_teacher_prompts, config, request.prompts),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=config.seed,
            masked_token_ids=await asyncio.to_thread(_masked_ids, config, info.vocab_size),
        )
        tokenizer = await self._teacher.tokenizer(info)
        texts = [TextStream(tokenizer.decode, info.eos_token_ids) for _ in request.prompts]
        async with aclosing(self._teacher.speculate(job)) as items:
            async for item in items:
                if self._closing:
                    raise _shutting_down()
                if isinstance(item, Speculated):
                    summary = _speculative_summary(item, info.weight_bytes, teacher_speed)
                    yield ModelAnswer("speculative", summary=summary)
                    continue
                text = texts[item.prompt_index].add(item.token_id, last=bool(item.finish_reason))
                yield ModelAnswer("speculative", item.prompt_index, text, 1, item.finish_reason)


def distilled_adapter(checkpoints: Path) -> Path | None:
    """The adapter a run has arrived at: its best one, else its final one, else that of its newest checkpoint."""
    named = (checkpoints / name for name in ("best", "final"))
    return next((path for path in named if path.is_dir()), None) or latest(checkpoints)


def _faults(request: ComparisonRequest, config: RunConfig) -> Collection[FieldViolation]:
    found = []
    if not request.prompts:
        found.append(FieldViolation("prompts", "none given; send at least one prompt"))
    if len(request.prompts) > MOST_PROMPTS:
        found.append(FieldViolation("prompts", f"{len(request.prompts)} prompts; send at most {MOST_PROMPTS}"))
    for index, prompt in enumerate(request.prompts):
        if not prompt.strip():
            found.append(FieldViolation(f"prompts[{index}]", "empty; say something"))
    for index, name in enumerate(request.models):
        if name not in COMPARED_MODELS:
            known = ", ".join(COMPARED_MODELS)
            found.append(FieldViolation(f"models[{index}]", f"{name!r} is no model of a run; there are {known}"))
        elif name == "sft" and not config.student_adapter_path:
            found.append(FieldViolation(f"models[{index}]", "the run started from a fresh adapter; leave 'sft' out"))
    if request.max_tokens < 0:
        found.append(FieldViolation("max_tokens", f"{request.max_tokens} is negative; use 0 for the run's own"))
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        found.append(FieldViolation("temperature", f"{request.temperature}: use 0 for greedy, or a positive number"))
    return found


def _teacher_prompts(config: RunConfig, prompts: Collection[str]) -> tuple[tuple[int, ...], ...]:
    """The prompts as the teacher reads them, just as in the run; blocks."""
    folder = Path(config.teacher_model_path if config.teacher_template == "teacher" else config.base_model_path)
    tokenizer = TextTokenizer(folder, folder.name)
    found = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        if config.teacher_system_prompt:
            messages = with_system_prompt(messages, config.teacher_system_prompt)
        if tokenizer.has_template:
            found.append(tokenizer.render_chat(messages, add_generation_prompt=True))
        else:
            found.append(tokenizer.encode("\n".join(message["content"] for message in messages)))
    return tuple(found)


def _masked_ids(config: RunConfig, teacher_size: int) -> tuple[int, ...]:
    """Ids that the teacher says neither here nor in the run, as only one of the two tokenizers knows them; blocks."""
    folders = (Path(config.teacher_model_path), Path(config.base_model_path))
    match = compare_vocabularies(*map(load_vocabulary, folders))
    return ids_below(match.unshared, teacher_size)


def _speculative_summary(measured: Speculated, teacher_bytes: int, teacher_speed: float | None) -> ModelSummary:
    summary = ModelSummary(
        measured.tokens,
        measured.seconds,
        weight_bytes=teacher_bytes + measured.draft_bytes,
        adapter_bytes=measured.adapter_bytes,
        peak_bytes=measured.peak_bytes,
        accepted_fraction=measured.accepted / measured.drafted if measured.drafted else None,
    )
    return replace(summary, speedup=summary.tokens_per_second / teacher_speed) if teacher_speed else summary


def _shutting_down() -> OpdError:
    return OpdError(Reason.SHUTTING_DOWN, "the daemon stops; compare again when it is back")


def _death(worker: WorkerProcess, code: int, kills: int) -> OpdError:
    if memory_ended(code, worker.log.last_words(), limited=False, kills=kills):
        return OpdError(Reason.OUT_OF_MEMORY, "memory ran out; compare with shorter answers, or free some memory")
    return OpdError(Reason.WORKER_DIED, meaning_of_exit(code, worker.log.last_line()).message)
