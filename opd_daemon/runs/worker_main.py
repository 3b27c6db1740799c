"""The worker process: does one run, talking to the daemon only through its public API.

`python -m opd_daemon.runs.worker_main --run RUN_ID`, with OPD_ADDRESS and OPD_WORKER_TOKEN in the environment and a
pipe from the daemon as standard input: when that closes the daemon is gone, so the worker writes a checkpoint and goes.
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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from opd_daemon.client import Client, RemoteTeacher
from opd_daemon.config import parse_config
from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit
from opd_daemon.home import Home, RunFolders
from opd_daemon.memory_limit import lift_memory_limit, limit_process_memory
from opd_daemon.plugins import PluginRegistry
from opd_daemon.types import Event, EventKind, Gauges, Run, RunState
from opd_daemon.v1 import run_pb2, worker_pb2, worker_pb2_grpc
from opd_daemon.wire.errors import from_rpc_error
from opd_daemon.wire.events import event_to_proto, gauges_to_proto, state_to_proto
from opd_daemon.wire.runs import run_from_proto

log = logging.getLogger(__name__)

ORPHAN_GRACE_SECONDS = 10.0
HEARTBEAT_SECONDS = 4.0
QUEUED_EVENTS = 1000


class Stop:
    """Whether, and why, the run should end early. Set from any thread; read by the trainer between steps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        """Whether to end."""
        return self._event.is_set()

    def ask(self, why: str) -> None:
        """Ask the trainer to write a checkpoint and return."""
        if not self._event.is_set():
            log.info("stopping: %s", why)
        self._event.set()


class StreamReporter:
    """`trainer.Reporter` over the ReportEvents stream; a bounded queue keeps events in order and the trainer honest."""

    def __init__(self, client: Client, run_id: str, stop: Stop) -> None:
        self._run_id = run_id
        self._stop = stop
        self._queue: queue.Queue[worker_pb2.ReportEventsRequest | None] = queue.Queue(QUEUED_EVENTS)
        self._stub = worker_pb2_grpc.WorkerServiceStub(client.channel)
        self._broken = threading.Event()
        self._call = self._open()

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        """Queue a durable event; blocks while the daemon is behind."""
        event = Event(kind, self._run_id, payload, datetime.now(UTC))
        self._send(worker_pb2.ReportEventsRequest(event=event_to_proto(event)))

    def gauges(self, values: dict[str, float]) -> None:
        """Queue readings, unless the daemon is behind: only the latest matter."""
        gauges = gauges_to_proto(Gauges(self._run_id, datetime.now(UTC), values))
        if self._queue.qsize() < QUEUED_EVENTS // 2:
            self._send(worker_pb2.ReportEventsRequest(gauges=gauges))

    def started(self) -> None:
        """Tell that the student is loaded and training begins."""
        self._send(worker_pb2.ReportEventsRequest(running=True))

    def settle(self) -> None:
        """Return once the daemon has stored everything so far; where it takes no more, the run stops anyway."""
        self._send(None)
        try:
            self._call.result()
        except grpc.RpcError:
            return
        self._call = self._open()

    def finish(self, state: RunState, error: OpdError | None = None, adapter_path: str = "") -> None:
        """Send the outcome and wait until everything is stored."""
        outcome = worker_pb2.RunOutcome(state=state_to_proto(state), adapter_path=adapter_path)
        if error is not None:
            outcome.error.CopyFrom(run_pb2.RunError(reason=error.reason, message=str(error)))
        self._send(worker_pb2.ReportEventsRequest(outcome=outcome))
        self._queue.put(None)
        try:
            self._call.result()
        except grpc.RpcError as broken:
            raise from_rpc_error(broken) from None

    def _open(self) -> grpc.Future[worker_pb2.ReportEventsResponse]:
        call = self._stub.ReportEvents.future(self._messages())
        call.add_done_callback(self._ended)
        return call

    def _send(self, message: worker_pb2.ReportEventsRequest | None) -> None:
        while not self._broken.is_set():
            try:
                self._queue.put(message, timeout=1.0)
            except queue.Full:
                continue
            return

    def _messages(self) -> Iterator[worker_pb2.ReportEventsRequest]:
        while True:
            try:
                message = self._queue.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                now = gauges_to_proto(Gauges(self._run_id, datetime.now(UTC), {}))
                message = worker_pb2.ReportEventsRequest(gauges=now)
            if message is None:
                return
            yield message

    def _ended(self, call: grpc.Future[worker_pb2.ReportEventsResponse]) -> None:
        if call.exception() is not None:
            self._broken.set()
            self._stop.ask("the daemon takes no more events")


def main() -> int:
    """Do the run named on the command line; the exit code is 0 once its outcome is stored."""
    parser = argparse.ArgumentParser(description="Worker process of the opd daemon; started by it, not by hand.")
    parser.add_argument("--run", required=True, help="the run to do")
    run_id: str = parser.parse_args().run
    if not released():
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.ask("asked by signal"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the daemon's business
    _in_background(_leave_with_the_daemon, stop)
    client = Client(os.environ.pop("OPD_ADDRESS"), os.environ.pop("OPD_WORKER_TOKEN"))
    _in_background(_watch_for_stop, client, run_id, stop)
    reporter = StreamReporter(client, run_id, stop)
    try:
        state, adapter_path = _do(client, run_id, reporter, stop)
    except BaseException as error:  # noqa: BLE001 - also a plugin's sys.exit is an outcome
        lift_memory_limit()
        traceback.print_exc()
        reporter.finish(*_outcome(error))
        return 0
    hit("worker.outcome.before")
    reporter.finish(state, adapter_path=adapter_path)
    hit("worker.outcome.after")
    return 0


def released() -> bool:
    """Wait until the daemon has remembered this process; false when it is gone before that."""
    return bool(os.read(sys.stdin.fileno(), 1))


def _do(client: Client, run_id: str, reporter: StreamReporter, stop: Stop) -> tuple[RunState, str]:
    """Load, train, save; the resting state and the folder of the final adapter."""
    assignment = assigned(client)
    run = run_from_proto(assignment.run)
    config = parse_config(run.config)
    limit_process_memory(config.worker_memory_limit_bytes)
    plugins = PluginRegistry.discover()
    trainer = plugins.trainer(config.trainer)

    from opd_daemon.distill.session import run_trainer  # imports mlx: only once the assignment is sound

    folders = Home.default().run(run_id)
    complete = run_trainer(
        run_id=run_id,
        config=config,
        trainer=trainer,
        folders=folders,
        teacher=RemoteTeacher(client, use_cache=config.use_cache, should_stop=stop),
        reporter=reporter,
        should_stop=stop,
        resume_from=Path(assignment.resume_path) if assignment.resume_path else None,
        memory_halvings=assignment.memory_halvings,
        divergences=plugins.divergences,
    )
    if not complete:
        return RunState.STOPPED, ""
    adapter_path = config.output_adapter_path or str(folders.checkpoints / "final")
    write_report_of(replace(run, adapter_path=adapter_path), folders)
    return RunState.SUCCEEDED, adapter_path


def write_report_of(run: Run, folders: RunFolders) -> None:
    """Write the report of a run that is complete. One that can't be written is no reason for the run to fail."""
    try:
        from opd_daemon.distill.report import write_report  # imports matplotlib

        write_report(replace(run, state=RunState.SUCCEEDED, finished_at=datetime.now(UTC)), folders)
    except Exception:
        log.exception("no report was written; 'opd report %s' tries again", run.run_id)


def assigned(client: Client) -> worker_pb2.GetAssignmentResponse:
    """What the daemon wants of this worker."""
    try:
        return worker_pb2_grpc.WorkerServiceStub(client.channel).GetAssignment(worker_pb2.GetAssignmentRequest())
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def _watch_for_stop(client: Client, run_id: str, stop: Stop) -> None:
    """List, then watch: a stop asked for at any time, also while this process started, is seen."""
    try:
        run, revision = client.run(run_id)
        if run.state is RunState.STOPPING:
            stop.ask("asked by the daemon")
        for item in client.watch(after_revision=revision, run_id=run_id):
            if isinstance(item, Event) and item.payload.get("state") == RunState.STOPPING:
                stop.ask("asked by the daemon")
    except OpdError as error:
        stop.ask(f"the watch ended: {error}")


def _leave_with_the_daemon(stop: Stop) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.ask("the daemon is gone")
    threading.Timer(ORPHAN_GRACE_SECONDS, os._exit, args=(1,)).start()


def _in_background(target: Any, *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _outcome(error: BaseException) -> tuple[RunState, OpdError]:
    """How a run ends by an error: where this process found no memory, its daemon may start another in less."""
    named = _as_opd_error(error)
    own = named.reason is Reason.OUT_OF_MEMORY and named.metadata.get("process") == "worker"
    return RunState.INTERRUPTED if own else RunState.FAILED, named


def _as_opd_error(error: BaseException) -> OpdError:
    if isinstance(error, OpdError):
        return error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return OpdError(Reason.TRAINER_FAILED, f"the trainer failed: {text}; the run's log has the details")


if __name__ == "__main__":
    sys.exit(main())
