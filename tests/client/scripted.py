"""A server that fails on purpose: what a real daemon can't be made to do at a chosen moment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import grpc

from opd_daemon.client import Client
from opd_daemon.types import Event, EventKind
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc
from opd_daemon.wire.events import event_to_proto

STORE = "store-1"


class ScriptedRuns(rpc.RunServiceServicer):
    """Keeps the requests and the tokens it was sent; `failures` calls fail as UNAVAILABLE first."""

    def __init__(self, events: int = 0, drop_after: int = 0, failures: int = 0) -> None:
        self.requests: list[Any] = []
        self.tokens: set[str] = set()
        self.events = events
        self.drop_after = drop_after
        self.failures = failures

    def _seen(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.tokens.update(value for key, value in context.invocation_metadata() if key == "authorization")
        if self.failures:
            self.failures -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    def ListRuns(self, request: pb.ListRunsRequest, context: grpc.ServicerContext) -> pb.ListRunsResponse:  # noqa: N802
        self._seen(request, context)
        page = int(request.page_token or 0)
        runs = [pb.Run(run_id=f"run-{2 * page + place}") for place in range(2)]
        return pb.ListRunsResponse(runs=runs, next_page_token=str(page + 1) if page < 2 else "")

    def ResumeRun(self, request: pb.ResumeRunRequest, context: grpc.ServicerContext) -> pb.ResumeRunResponse:  # noqa: N802
        self._seen(request, context)
        return pb.ResumeRunResponse(run=pb.Run(run_id=request.run_id), from_step=1)

    def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEventsResponse]:
        self._seen(request, context)
        yield pb.WatchEventsResponse(started=pb.WatchStarted(store_id=STORE, revision=self.events, oldest_revision=1))
        after = request.after_revision if request.HasField("after_revision") else self.events
        last = min(after + self.drop_after, self.events) if self.drop_after else self.events
        for revision in range(after + 1, last + 1):
            event = Event(EventKind.LOG, "run", {"level": "info", "text": str(revision)}, datetime.now(UTC), revision)
            yield pb.WatchEventsResponse(events=pb.EventBatch(events=[event_to_proto(event)], revision=revision))
        if last < self.events:
            context.abort(grpc.StatusCode.UNAVAILABLE, "dropped")


@contextmanager
def scripted(runs: ScriptedRuns) -> Iterator[Client]:
    """A client of a scripted server on a loopback port."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_RunServiceServicer_to_server(runs, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", "secret") as client:
            yield client
    finally:
        server.stop(None).wait()
