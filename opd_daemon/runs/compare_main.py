"""The worker process of a comparison: the student's models answer here, the teacher through the daemon's public API.

`python -m opd_daemon.runs.compare_main --run RUN_ID`, started as `worker_main` is. When the daemon is gone, or nobody
listens any more, there is nothing to save: it ends at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import grpc

from opd_daemon.client import Client, RemoteTeacher
from opd_daemon.config import parse_config
from opd_daemon.errors import OUT_OF_MEMORY_SIGNS, OpdError, Reason
from opd_daemon.memory_limit import lift_memory_limit, limit_process_memory
from opd_daemon.runs.worker_main import assigned, released
from opd_daemon.types import GenerateRequest, ModelAnswer
from opd_daemon.v1 import run_pb2, worker_pb2, worker_pb2_grpc
from opd_daemon.wire.comparison import answer_to_proto, request_from_proto
from opd_daemon.wire.errors import from_rpc_error
from opd_daemon.wire.runs import run_from_proto

QUEUED_ANSWERS = 1000


class AnswerStream:
    """What this process has to say, over ReportComparison, in order."""

    def __init__(self, client: Client) -> None:
        self._queue: queue.Queue[worker_pb2.ReportComparisonRequest | None] = queue.Queue(QUEUED_ANSWERS)
        self._call = worker_pb2_grpc.WorkerServiceStub(client.channel).ReportComparison.future(
            iter(self._queue.get, None)
        )
        self._call.add_done_callback(_leave_if_nobody_listens)

    def send(self, answer: ModelAnswer) -> None:
        """Queue a piece of an answer; blocks while the caller is behind."""
        self._queue.put(worker_pb2.ReportComparisonRequest(response=answer_to_proto(answer)))

    def finish(self, error: OpdError | None = None) -> None:
        """Say that this was all, or why there is no more, and wait until it has arrived."""
        if error is not None:
            message = run_pb2.RunError(reason=error.reason, message=str(error))
            self._queue.put(worker_pb2.ReportComparisonRequest(error=message))
        self._queue.put(None)
        try:
            self._call.result()
        except grpc.RpcError as broken:
            raise from_rpc_error(broken) from None


def main() -> int:
    """Compare the models of the run named on the command line."""
    parser = argparse.ArgumentParser(description="Worker process of the opd daemon; started by it, not by hand.")
    parser.add_argument("--run", required=True, help="the run whose models are compared")
    parser.parse_args()
    if not released():
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the daemon's business
    threading.Thread(target=_leave_with_the_daemon, daemon=True).start()
    client = Client(os.environ.pop("OPD_ADDRESS"), os.environ.pop("OPD_WORKER_TOKEN"))
    stream = AnswerStream(client)
    try:
        _compare(client, stream)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
        lift_memory_limit()
        traceback.print_exc()
        stream.finish(_as_opd_error(error))
        return 0
    stream.finish()
    return 0


def _compare(client: Client, stream: AnswerStream) -> None:
    assignment = assigned(client)
    config = parse_config(run_from_proto(assignment.run).config)
    limit_process_memory(config.worker_memory_limit_bytes)

    from opd_daemon.distill.compare import Comparison, Piece  # imports mlx

    def speak(request: GenerateRequest) -> Iterator[Piece]:
        for piece in client.stream_generation([request], use_cache=False):
            ids = tuple(token.token_id for token in piece.tokens)
            yield Piece(ids, piece.text, piece.finish_reason)

    adapters = {"sft": config.student_adapter_path, "distilled": assignment.resume_path}
    Comparison(
        request_from_proto(assignment.comparison),
        config=config,
        adapters={name: Path(folder) for name, folder in adapters.items() if folder},
        teacher=RemoteTeacher(client, use_cache=config.use_cache),
        speak=speak,
        report=stream.send,
    ).run()


def _as_opd_error(error: Exception) -> OpdError:
    if isinstance(error, OpdError):
        return error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, MemoryError) or OUT_OF_MEMORY_SIGNS.search(text):
        return OpdError(Reason.OUT_OF_MEMORY, "memory ran out; compare with shorter answers, or free some memory")
    return OpdError(Reason.INTERNAL, "the comparison failed; the run's log has the details")


def _leave_with_the_daemon() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def _leave_if_nobody_listens(call: grpc.Future[worker_pb2.ReportComparisonResponse]) -> None:
    if call.cancelled() or call.exception() is not None:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
