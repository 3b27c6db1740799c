"""What a worker may say, mutated: its run takes it or refuses it with a reason. In this process, with a stub worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from opd_daemon.home import Home
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.interceptor import Border
from opd_daemon.rpc.worker_service import WorkerServicer
from opd_daemon.runs.comparison import Comparisons
from opd_daemon.v1 import event_pb2, run_pb2, worker_pb2
from opd_daemon.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from tests.bad_inputs.mutation import Method, Mutator, methods
from tests.bad_inputs.soak import SOAK
from tests.runs.daemon import Daemon, Stage

SEED = 20261126
REQUESTS = 2_000 if SOAK else 120
HEADERS = (("authorization", "Bearer worker"),)
CALLS = [method for method in methods() if "WorkerService" in method.path]
FORBIDDEN = {"UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED"}


class Worker:
    """Speaks for the run of a daemon in this process; when that run has come to rest, for a new one."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._run_id = ""
        self.said = 0

    async def serve(self) -> grpc.aio.Server:
        """A server behind the border, for which this worker's token is good."""
        relay = SimpleNamespace(say=self._say, assignment=None)
        comparisons = SimpleNamespace(relay=lambda _: relay)
        server = grpc.aio.server(interceptors=[Border(Gate("client", lambda _: self._run_id), Home(Path("home")))])
        servicer = WorkerServicer(self._daemon.runs, self._daemon.events, cast(Comparisons, comparisons))
        add_WorkerServiceServicer_to_server(servicer, server)
        return server

    async def _say(self, word: object) -> None:
        self.said += 1

    async def send(self, channel: grpc.aio.Channel, method: Method, requests: list[bytes]) -> str:
        """One call; the code of the answer."""
        if not self._run_id or (await self._daemon.runs.get(self._run_id)).state.resting:
            self._run_id = await self._daemon.start()
        style = f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
        sent: Any = iter(requests) if method.streams_in else requests[0]
        call = getattr(channel, style)(method.path)(sent, metadata=HEADERS, timeout=30)
        try:
            await (call.read() if method.streams_out else call)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


def converse(root: Path, conversation: list[tuple[Method, list[bytes]]]) -> list[str]:
    """Send calls one after another as the worker of a run; their codes."""

    async def scenario() -> list[str]:
        async with Stage(root).daemon() as daemon:
            worker = Worker(daemon)
            server = await worker.serve()
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                codes = [await worker.send(channel, method, requests) for method, requests in conversation]
            await server.stop(0)
            return codes

    return asyncio.run(scenario())


def test_nothing_a_worker_says_breaks_anything(tmp_path: Path) -> None:
    mutator = Mutator(SEED, {"seconds": [1_800_000_000], "nanos": [0], "path": ["/c/step_1"]})
    conversation = []
    for number in range(REQUESTS):
        method = CALLS[number % len(CALLS)]
        # A relay is asked for what it compares only where there is one, and this one compares nothing.
        if not method.path.endswith("/GetAssignment"):
            conversation.append((method, [mutator.request(method) for _ in range(1 + number % 3)]))
    codes = Counter(converse(tmp_path, conversation))
    assert not FORBIDDEN & codes.keys(), codes
    assert codes["OK"] > 0.05 * len(conversation), codes


def report(**item: Any) -> bytes:
    return worker_pb2.ReportEventsRequest(**item).SerializeToString()


TOO_LATE = Timestamp(seconds=2**62)
# What was found: items of ReportEvents that were answered with INTERNAL, or that broke calls which tell of them.
REGRESSIONS = {
    "event of no year": report(event=event_pb2.Event(time=TOO_LATE, log_line=event_pb2.LogLine(text="x"))),
    "gauges of no year": report(gauges=event_pb2.Gauges(time=TOO_LATE, values={"tokens": 1.0})),
    "gauges without end": report(gauges=event_pb2.Gauges(values={20_000 * "x": 1.0})),
    "tasks without end": report(
        event=event_pb2.Event(evaluation_metrics=event_pb2.EvaluationMetrics(tasks={99_000 * "x": 1}))
    ),
    "path without end": report(
        event=event_pb2.Event(checkpoint_written=event_pb2.CheckpointWritten(step=1, path=5000 * "/x"))
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_broke_is_refused(tmp_path: Path, name: str) -> None:
    [call] = [method for method in CALLS if method.path.endswith("/ReportEvents")]
    assert converse(tmp_path, [(call, [REGRESSIONS[name]])]) == ["INVALID_ARGUMENT"]


def test_a_duration_beyond_any_is_taken(tmp_path: Path) -> None:
    summary = run_pb2.ModelSummary()
    summary.duration.seconds = 2**62
    response = run_pb2.CompareModelsResponse(model="base", summary=summary)
    request = worker_pb2.ReportComparisonRequest(response=response).SerializeToString()
    [call] = [method for method in CALLS if method.path.endswith("/ReportComparison")]
    assert "INTERNAL" not in converse(tmp_path, [(call, [request])])
