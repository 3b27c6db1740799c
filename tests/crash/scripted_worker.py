"""A worker without a model: does its run through the public API and through the real file functions, in milliseconds.

`session_id` of the run says what kind of worker it is. It says "ATTEMPT.NUMBER" in numbered log events, and writes down
in `acknowledged/RUN_ID` beside the home what the daemon has acknowledged of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BURST = 5
STEP_SECONDS = 0.004
CHECKPOINT_EVERY = 3
GRACE_SECONDS = 0.5

if not os.read(0, 1):  # the daemon is gone before it remembered this process
    sys.exit(0)

import grpc

from opd_daemon.distill.checkpoints import OPTIMIZER, Checkpoints, RunProgress, copy_adapter, folder_bytes
from opd_daemon.distill.files import append_line, write_file, write_folder
from opd_daemon.failpoints import hit
from opd_daemon.v1 import event_pb2, run_pb2, run_pb2_grpc, worker_pb2, worker_pb2_grpc

EMPTY_TENSORS = b"\x08\0\0\0\0\0\0\0{}      "


class Teller:
    """Reports to the daemon in bursts, each of which is acknowledged as a whole."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.metadata = (("authorization", f"Bearer {os.environ['OPD_WORKER_TOKEN']}"),)
        channel = grpc.insecure_channel(os.environ["OPD_ADDRESS"])
        self.worker = worker_pb2_grpc.WorkerServiceStub(channel)
        self.runs = run_pb2_grpc.RunServiceStub(channel)
        self.assignment = self.worker.GetAssignment(
            worker_pb2.GetAssignmentRequest(), metadata=self.metadata, wait_for_ready=True, timeout=20
        )
        self.attempt = self.assignment.run.attempt
        self.said = 0
        self.waiting: list[worker_pb2.ReportEventsRequest] = []
        home = Path(os.environ["OPD_HOME"])
        self.acknowledged = home.parent / "acknowledged" / run_id

    def event(self, **kind: Any) -> None:
        event = event_pb2.Event(run_id=self.run_id, **kind)
        event.time.GetCurrentTime()
        self.waiting.append(worker_pb2.ReportEventsRequest(event=event))

    def count(self) -> None:
        self.said += 1
        self.event(log_line=event_pb2.LogLine(level=event_pb2.LOG_LEVEL_INFO, text=f"{self.attempt}.{self.said}"))

    def settle(self) -> None:
        """Send the burst; what returns is acknowledged, and written down as such."""
        messages, self.waiting = self.waiting, []
        self.worker.ReportEvents(iter(messages), metadata=self.metadata)
        self.acknowledged.parent.mkdir(exist_ok=True)
        with self.acknowledged.open("a") as file:
            file.write(f"{self.attempt}.{self.said}\n")

    def asked_to_stop(self) -> bool:
        run = self.runs.GetRun(run_pb2.GetRunRequest(run_id=self.run_id), metadata=self.metadata).run
        return bool(run.state == event_pb2.RUN_STATE_STOPPING)

    def outcome(self, state: Any, adapter_path: str = "") -> None:
        outcome = worker_pb2.RunOutcome(state=state, adapter_path=adapter_path)
        self.waiting.append(worker_pb2.ReportEventsRequest(outcome=outcome))
        hit("worker.outcome.before")
        self.settle()
        hit("worker.outcome.after")


def train(teller: Teller, stopping: Callable[[], bool]) -> None:
    """Steps with metrics, rows and checkpoints as a real worker has them, then best, final, output and report."""
    home, run = Path(os.environ["OPD_HOME"]), teller.assignment.run
    checkpoints = Checkpoints(home / "checkpoints" / run.run_id, keep_last=2)
    start = 0
    if teller.assignment.resume_path:
        start = json.loads((Path(teller.assignment.resume_path) / "state.json").read_text())["step"]
    checkpoints.forget_after(start)
    teller.waiting.append(worker_pb2.ReportEventsRequest(running=True))
    teller.settle()
    for step in range(start + 1, run.total_steps + 1):
        time.sleep(STEP_SECONDS)
        append_line(home / "metrics" / f"{run.run_id}_train.jsonl", json.dumps({"step": step, "loss": 1.0}))
        teller.event(step_metrics=event_pb2.StepMetrics(step=step, total_steps=run.total_steps, loss=1.0))
        for _ in range(BURST):
            teller.count()
        teller.settle()
        last = stopping() or teller.asked_to_stop()
        if step % CHECKPOINT_EVERY == 0 or last:
            report(teller, step, checkpoints.save_step(RunProgress(step=step), save))
        if last:
            teller.outcome(event_pb2.RUN_STATE_STOPPED)
            return
    report(teller, run.total_steps, checkpoints.save_named("best", save), is_best=True)
    final = checkpoints.save_named("final", save)
    report(teller, run.total_steps, final, is_final=True)
    if run.config.output_adapter_path:
        copy_adapter(final, Path(run.config.output_adapter_path))
    write_file(home / "reports" / f"{run.run_id}.html", b"<html></html>")
    write_folder(home / "reports" / run.run_id, lambda folder: write_file(folder / "loss.png", b"picture"))
    teller.outcome(event_pb2.RUN_STATE_SUCCEEDED, str(final))


def save(folder: Path) -> None:
    for name in ("adapters.safetensors", OPTIMIZER):
        write_file(folder / name, EMPTY_TENSORS)
    write_file(folder / "adapter_config.json", b"{}")


def report(teller: Teller, step: int, path: Path, **flags: bool) -> None:
    size = folder_bytes(path)
    teller.event(checkpoint_written=event_pb2.CheckpointWritten(step=step, path=str(path), bytes=size, **flags))
    teller.settle()


def flood(teller: Teller, events: int) -> None:
    """As many events as fast as the daemon takes them."""

    def messages() -> Iterator[worker_pb2.ReportEventsRequest]:
        yield worker_pb2.ReportEventsRequest(running=True)
        for number in range(1, events + 1):
            teller.count()
            yield teller.waiting.pop()
            if number % 1000 == 0:
                sys.stdout.write(f"said {number}\n")

    teller.worker.ReportEvents(messages(), metadata=teller.metadata)
    teller.outcome(event_pb2.RUN_STATE_SUCCEEDED)


def shout() -> None:
    """Print without end."""
    while True:
        os.write(1, b"x" * 1_000_000)
        time.sleep(0.001)


def leave_with_the_daemon(stopped: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stopped.set()
    threading.Timer(GRACE_SECONDS, os._exit, args=(1,)).start()


def main() -> None:
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    teller = Teller(sys.argv[-1])
    kind, _, number = teller.assignment.run.config.session_id.partition("-")
    if kind == "stays":  # it outlives its daemon
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        threading.Thread(target=leave_with_the_daemon, args=(stopped,), daemon=True).start()
    sys.stdout.write(f"ready {os.getpid()}\n")
    sys.stdout.flush()
    match kind:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs" | "stays":
            teller.waiting.append(worker_pb2.ReportEventsRequest(running=True))
            teller.settle()
            time.sleep(600)
        case "hangs.politely":
            teller.waiting.append(worker_pb2.ReportEventsRequest(running=True))
            teller.settle()
            stopped.wait(600)
            teller.outcome(event_pb2.RUN_STATE_STOPPED)
        case "floods":
            flood(teller, int(number))
        case "shouts":
            shout()
        case _:
            train(teller, stopped.is_set)


main()
