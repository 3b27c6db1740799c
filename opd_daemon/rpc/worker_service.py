"""WorkerService: what a worker process needs of the daemon, for its own run only."""

from __future__ import annotations

from collections.abc import AsyncIterator

from opd_daemon.errors import OpdError, Reason, invalid
from opd_daemon.events import EventLog
from opd_daemon.rpc.access import caller
from opd_daemon.rpc.interceptor import Context
from opd_daemon.runs.comparison import Comparisons
from opd_daemon.runs.ledger import check_path
from opd_daemon.runs.manager import RunManager
from opd_daemon.types import Event, EventKind, Gauges
from opd_daemon.v1 import worker_pb2 as pb
from opd_daemon.v1 import worker_pb2_grpc as rpc
from opd_daemon.wire.comparison import answer_from_proto, error_from_proto, request_to_proto
from opd_daemon.wire.events import event_from_proto, gauges_from_proto, state_from_proto
from opd_daemon.wire.runs import run_to_proto

# Texts are shortened instead.
MOST_EVENT_BYTES = 64 << 10
MOST_GAUGE_BYTES = 16 << 10
TEXTS = (EventKind.LOG, EventKind.SAMPLE)


class WorkerServicer(rpc.WorkerServiceServicer):
    """Thin layer over the run manager, for callers that hold a run's token."""

    def __init__(self, runs: RunManager, events: EventLog, comparisons: Comparisons) -> None:
        self._runs = runs
        self._events = events
        self._comparisons = comparisons

    async def GetAssignment(self, request: pb.GetAssignmentRequest, context: Context) -> pb.GetAssignmentResponse:
        relay = self._comparisons.relay(_own_run())
        if relay is not None:
            run, assigned = await self._runs.get(_own_run()), relay.assignment
            request_message = request_to_proto(assigned.request)
            return pb.GetAssignmentResponse(
                run=run_to_proto(run), resume_path=assigned.adapter_path, comparison=request_message
            )
        run, resume_path = await self._runs.assignment(_own_run())
        return pb.GetAssignmentResponse(
            run=run_to_proto(run), resume_path=resume_path, memory_halvings=run.memory_halvings
        )

    async def ReportEvents(
        self, request: AsyncIterator[pb.ReportEventsRequest], context: Context
    ) -> pb.ReportEventsResponse:
        run_id = _own_run()
        async for message in request:
            await self._take(run_id, message)
        return pb.ReportEventsResponse(revision=await self._events.revision())

    async def ReportComparison(
        self, request: AsyncIterator[pb.ReportComparisonRequest], context: Context
    ) -> pb.ReportComparisonResponse:
        relay = self._comparisons.relay(_own_run())
        if relay is None:
            raise OpdError(Reason.RUN_STATE_CONFLICT, f"no comparison of run {_own_run()!r} is going on")
        async for message in request:
            if message.HasField("error"):
                await relay.say(error_from_proto(message.error))
            else:
                await relay.say(answer_from_proto(message.response))
        return pb.ReportComparisonResponse()

    async def AcquireLease(
        self, request: pb.AcquireLeaseRequest, context: Context
    ) -> AsyncIterator[pb.AcquireLeaseResponse]:
        raise OpdError(Reason.NOT_IMPLEMENTED, "leases are not available in this version; phases follow one another")
        yield  # an async generator, as its signature promises

    async def _take(self, run_id: str, message: pb.ReportEventsRequest) -> None:
        match message.WhichOneof("item"):
            case "event":
                event = event_from_proto(message.event)
                if event is not None:
                    _require_small(message.event.ByteSize(), event)
                    await self._runs.report(run_id, Event(event.kind, run_id, event.payload, event.time))
            case "gauges":
                if message.gauges.ByteSize() > MOST_GAUGE_BYTES:
                    size = f"{message.gauges.ByteSize()} bytes; send at most {MOST_GAUGE_BYTES}"
                    raise invalid("gauges", size)
                gauges = gauges_from_proto(message.gauges)
                self._runs.read_gauges(Gauges(run_id, gauges.time, gauges.values))
            case "running":
                await self._runs.running(run_id)
            case "outcome":
                await self._finish(run_id, message.outcome)
            case _:
                raise invalid("item", "empty: send an event, gauges, running or outcome")

    async def _finish(self, run_id: str, outcome: pb.RunOutcome) -> None:
        state = state_from_proto(outcome.state)
        if state is None or not state.resting:
            raise invalid("outcome.state", "not a resting state; send SUCCEEDED, STOPPED, FAILED or INTERRUPTED")
        if outcome.adapter_path:
            check_path("outcome.adapter_path", outcome.adapter_path)
        await self._runs.finish(
            run_id,
            state,
            error_reason=outcome.error.reason,
            error_message=outcome.error.message,
            adapter_path=outcome.adapter_path,
        )


def _require_small(size: int, event: Event) -> None:
    if size > MOST_EVENT_BYTES and event.kind not in TEXTS:
        raise invalid("event", f"{size} bytes; an event of kind {event.kind} has at most {MOST_EVENT_BYTES}")


def _own_run() -> str:
    run_id = caller.get().run_id
    if not run_id:
        raise OpdError(Reason.OUT_OF_SCOPE, "only a worker may call this, with the token made for its run")
    return run_id
