"""RunService: runs and the watch on their events."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, TypeVar

from google.protobuf.message import Message

from opd_daemon.config import PRESETS
from opd_daemon.distill.adapter import adapter_files
from opd_daemon.errors import FieldViolation, OpdError, Reason, invalid, violations_error
from opd_daemon.events import Bookmark, EventBatch, EventLog, GaugeReadings, WatchItem, WatchStarted
from opd_daemon.failpoints import hit
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.access import caller
from opd_daemon.rpc.interceptor import Context
from opd_daemon.runs.comparison import Comparisons
from opd_daemon.runs.downloads import open_folder
from opd_daemon.runs.manager import RunManager
from opd_daemon.runs.uploads import UploadPiece, Uploads
from opd_daemon.types import Checkpoint, Run, RunState
from opd_daemon.v1 import event_pb2
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc
from opd_daemon.wire import comparison
from opd_daemon.wire import runs as wire
from opd_daemon.wire.events import (
    evaluation_to_proto,
    event_to_proto,
    gauges_to_proto,
    metrics_to_proto,
    state_from_proto,
)

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
MAX_RUNS_PAGE, DEFAULT_RUNS_PAGE = 500, 50
MAX_METRICS_PAGE, DEFAULT_METRICS_PAGE = 5000, 1000
MAX_REQUEST_ID = 64
# Clients take messages of at most 4 MiB, and lists of runs carry configurations and errors.
MAX_CONFIG_BYTES = 64 << 10
LIST_BYTES = 1 << 20
# About a megabyte.
MAX_EVALUATIONS = 500


class RunServicer(rpc.RunServiceServicer):
    """Thin layer over `runs.manager.RunManager` and `events.EventLog`."""

    def __init__(
        self,
        runs: RunManager,
        events: EventLog,
        comparisons: Comparisons,
        *,
        uploads: Uploads,
        roots: AllowedRoots,
    ) -> None:
        self._runs = runs
        self._events = events
        self._comparisons = comparisons
        self._uploads = uploads
        self._roots = roots
        self._said: WatchItem | None = None
        self._answer = pb.WatchEventsResponse()

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        if len(request.request_id) > MAX_REQUEST_ID:
            raise invalid("request_id", f"{len(request.request_id)} characters long; use at most {MAX_REQUEST_ID}")
        if request.config.ByteSize() > MAX_CONFIG_BYTES:
            size = f"{request.config.ByteSize()} bytes; use at most {MAX_CONFIG_BYTES}"
            raise invalid("config", size, Reason.INVALID_RUN_CONFIG)
        values = {**_preset(request.preset), **wire.config_from_proto(request.config)}
        revision = await self._events.revision()
        run = await self._runs.create(
            values,
            request_id=request.request_id,
            validate_only=request.validate_only,
            machine=request.machine,
            force=request.force,
        )
        accepted = await self._events.read(lambda store: store.accepted_at(run.run_id))
        # An answer to a request that came again: all that happened since is missed by watching from now on.
        revision = revision if accepted is None else min(revision, accepted)
        return pb.CreateRunResponse(run=wire.run_to_proto(run), revision=revision)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        _require_run_id(request.run_id)
        caller.get().require_run(request.run_id)
        revision = await self._events.revision()
        return pb.GetRunResponse(run=wire.run_to_proto(await self._runs.get(request.run_id)), revision=revision)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        revision = await self._events.revision()
        size = _page_size(request.page_size, DEFAULT_RUNS_PAGE, MAX_RUNS_PAGE)
        states = frozenset(_state(value) for value in request.states)
        runs, token = await self._runs.list(page_size=size, page_token=request.page_token, states=states)
        messages = [wire.run_to_proto(run) for run in runs]
        fitting = _fitting(messages)
        if fitting < len(messages):
            runs, token = await self._runs.list(page_size=fitting, page_token=request.page_token, states=states)
            messages = [wire.run_to_proto(run) for run in runs]
        return pb.ListRunsResponse(runs=messages, next_page_token=token, revision=revision)

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        _require_run_id(request.run_id)
        return pb.StopRunResponse(run=wire.run_to_proto(await self._runs.stop(request.run_id)))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        _require_run_id(request.run_id)
        run, from_step = await self._runs.resume(request.run_id)
        return pb.ResumeRunResponse(run=wire.run_to_proto(run), from_step=from_step)

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Context) -> pb.DeleteRunResponse:
        _require_run_id(request.run_id)
        await self._runs.delete(request.run_id)
        return pb.DeleteRunResponse()

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Context) -> pb.ListMetricsResponse:
        _require_run_id(request.run_id)
        if request.stride < 0:
            raise invalid("stride", f"{request.stride} is negative; use 0 or 1 for every step")
        size = _page_size(request.page_size, DEFAULT_METRICS_PAGE, MAX_METRICS_PAGE)
        after_step = _step_of(request.page_token)
        steps, more = await self._runs.metrics(
            request.run_id, after_step=after_step, limit=size, stride=max(1, request.stride)
        )
        response = pb.ListMetricsResponse(steps=[metrics_to_proto(row) for row in steps])
        if more:
            response.next_page_token = str(steps[-1]["step"])
        if not request.page_token:
            evaluations = await self._runs.evaluations(request.run_id)
            response.evaluations.extend(evaluation_to_proto(row) for row in _thinned(evaluations, MAX_EVALUATIONS))
        best = [entry for entry in await self._runs.checkpoints(request.run_id) if entry.is_best]
        if best:
            response.best_checkpoint.CopyFrom(wire.checkpoint_to_proto(best[-1]))
        return response

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Context) -> pb.ListCheckpointsResponse:
        _require_run_id(request.run_id)
        checkpoints = await self._runs.checkpoints(request.run_id)
        return pb.ListCheckpointsResponse(checkpoints=[wire.checkpoint_to_proto(entry) for entry in checkpoints])

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        _require_run_id(request.run_id)
        folder = _chosen(await self._runs.checkpoints(request.run_id), request)
        async with aclosing(_sent(await asyncio.to_thread(_adapter, folder, request.run_id))) as chunks:
            async for name, size, offset, data in chunks:
                yield pb.DownloadAdapterResponse(file_name=name, file_bytes=size, offset=offset, data=data)
                hit("adapter.stream")

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        if caller.get().run_id:
            caller.get().require_run(request.run_id)
        if request.run_id:
            await self._runs.get(request.run_id)
        after = request.after_revision if request.HasField("after_revision") else None
        items = self._events.watch(
            after_revision=after,
            run_id=request.run_id or None,
            expected_store_id=request.expected_store_id,
            refusable=not caller.get().run_id,  # a worker learns by its watch that it shall stop
        )
        async with aclosing(items):
            async for item in items:
                yield self._watch_response(item)

    def _watch_response(self, item: WatchItem) -> pb.WatchEventsResponse:
        # A crowd of watchers is given the same batch, one after the other: it is translated once.
        if item is not self._said:
            self._said, self._answer = item, _watch_response(item)
        return self._answer

    async def DownloadReport(
        self, request: pb.DownloadReportRequest, context: Context
    ) -> AsyncIterator[pb.DownloadReportResponse]:
        _require_run_id(request.run_id)
        async with aclosing(_sent(await self._runs.open_report(request.run_id))) as chunks:
            async for name, size, offset, data in chunks:
                yield pb.DownloadReportResponse(file_name=name, file_bytes=size, offset=offset, data=data)

    async def CompareModels(
        self, request: pb.CompareModelsRequest, context: Context
    ) -> AsyncIterator[pb.CompareModelsResponse]:
        _require_run_id(request.run_id)
        run = await self._runs.get(request.run_id)
        await asyncio.to_thread(self._check_paths, run)
        async with aclosing(self._comparisons.compare(comparison.request_from_proto(request))) as answers:
            async for answer in answers:
                yield comparison.answer_to_proto(answer)

    async def UploadPrompts(
        self, request: AsyncIterator[pb.UploadPromptsRequest], context: Context
    ) -> pb.UploadPromptsResponse:
        kept = await self._uploads.receive(_pieces(request))
        return pb.UploadPromptsResponse(path=str(kept.path), sha256=kept.sha256, bytes=kept.bytes)

    def _check_paths(self, run: Run) -> None:
        """The run was accepted once, but links may lead elsewhere today, and other folders may be allowed."""
        if faults := dict(self._roots.faults_of_run(run.config)):
            violations = [FieldViolation(f"config.{name}", fault) for name, fault in faults.items()]
            raise violations_error(violations, Reason.PATH_NOT_ALLOWED)


async def _pieces(messages: AsyncIterator[pb.UploadPromptsRequest]) -> AsyncIterator[UploadPiece]:
    async for message in messages:
        yield UploadPiece(message.data, message.sha256)


async def _sent(files: Sequence[BinaryIO]) -> AsyncGenerator[tuple[str, int, int, bytes]]:
    """Name, size, offset and data of every piece of the files, which are closed at the end."""
    with ExitStack() as opened:
        for file in files:
            opened.enter_context(file)
        for file in files:
            name, size, offset = Path(file.name).name, os.fstat(file.fileno()).st_size, 0
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield name, size, offset, data
                offset += len(data)


def _adapter(folder: Path, run_id: str) -> list[BinaryIO]:
    """The opened files of an adapter. Raises CHECKPOINT_NOT_FOUND."""
    try:
        files = open_folder(folder, adapter_files)
    except (FileNotFoundError, NotADirectoryError):
        files = []
    if not files:
        message = f"the adapter's folder {folder.name} of run {run_id!r} has been deleted; choose another"
        raise OpdError(Reason.CHECKPOINT_NOT_FOUND, message, run_id=run_id)
    return files


def _require_run_id(run_id: str) -> None:
    if not run_id:
        raise invalid("run_id", "empty: name a run, as ListRuns shows them")


def _preset(name: str) -> dict[str, object]:
    if name and name not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise invalid("preset", f"{name!r} is no preset; there are {known}", Reason.INVALID_RUN_CONFIG)
    return dict(PRESETS[name]) if name else {}


def _state(value: event_pb2.RunState.ValueType) -> RunState:
    state = state_from_proto(value)
    if state is None:
        raise invalid("states", f"{value} is no state of a run; leave it out for all of them")
    return state


def _page_size(asked: int, default: int, limit: int) -> int:
    if asked < 0:
        raise invalid("page_size", f"{asked} is negative; use 0 for the default of {default}")
    return min(asked or default, limit)


def _fitting(messages: Sequence[Message]) -> int:
    """How many of the first messages fit into one list; at least one."""
    sizes = accumulate(message.ByteSize() for message in messages)
    return max(1, sum(size <= LIST_BYTES for size in sizes)) if messages else 0


def _thinned(rows: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly chosen, the first and the last always."""
    if len(rows) <= most:
        return list(rows)
    return [rows[place * (len(rows) - 1) // (most - 1)] for place in range(most)]


def _step_of(page_token: str) -> int:
    if page_token and not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 19):
        raise invalid("page_token", "not a token this daemon gave out", Reason.INVALID_PAGE_TOKEN)
    return int(page_token or -1)


def _chosen(checkpoints: list[Checkpoint], request: pb.DownloadAdapterRequest) -> Path:
    best = [entry for entry in checkpoints if entry.is_best]
    final = [entry for entry in checkpoints if entry.is_final]
    candidates = {
        pb.ADAPTER_CHOICE_BEST: best,
        pb.ADAPTER_CHOICE_FINAL: final,
    }.get(request.choice, best or final or checkpoints)
    if not candidates:
        message = f"run {request.run_id!r} has no such adapter yet; 'opd status' shows its checkpoints"
        raise OpdError(Reason.CHECKPOINT_NOT_FOUND, message, run_id=request.run_id)
    return Path(candidates[-1].path)


def _watch_response(item: WatchItem) -> pb.WatchEventsResponse:
    match item:
        case WatchStarted():
            started = pb.WatchStarted(
                store_id=item.store_id, revision=item.revision, oldest_revision=item.oldest_revision
            )
            return pb.WatchEventsResponse(started=started)
        case EventBatch():
            events = [event_to_proto(event) for event in item.events]
            return pb.WatchEventsResponse(events=pb.EventBatch(events=events, revision=item.revision))
        case Bookmark():
            return pb.WatchEventsResponse(bookmark=pb.Bookmark(revision=item.revision))
        case GaugeReadings():
            return pb.WatchEventsResponse(gauges=gauges_to_proto(item.gauges))
