"""What watchers cost: 1 000 of them and one that never reads, against none, in one run.

    python bench/watch.py [--watchers 1000] [--seconds 10] [--pairs 15]

The daemon's own log and services are served from a process of their own on a unix socket; watchers live in another.
Three tables: the producer's latency (one ReportEvents call with one metric event, until it is safe on the disk) at a
steady rate; events delivered while eight producers send all they can; and the time of a training step (a synthetic
worker: some seconds of matrix products on one thread) whose metric event goes to all watchers, against the step beside
it that reports nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# The synthetic worker computes on one thread; read when numpy is imported.
os.environ.update(OPENBLAS_NUM_THREADS="1", VECLIB_MAXIMUM_THREADS="1")

import grpc
import numpy as np
import psutil

from opd_daemon.client.connection import TokenInterceptor
from opd_daemon.events import EventLog
from opd_daemon.home import Home
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.interceptor import Border
from opd_daemon.rpc.run_service import RunServicer
from opd_daemon.rpc.worker_service import WorkerServicer
from opd_daemon.store import Store
from opd_daemon.types import Event, EventKind
from opd_daemon.v1 import run_pb2, run_pb2_grpc, worker_pb2, worker_pb2_grpc
from opd_daemon.wire.events import event_to_proto

CLIENT, WORKER, RUN = "client", "worker", "bench"
RATE = 20.0
PRODUCERS = 8
STREAMS_PER_CHANNEL = 100
PRODUCTS_PER_STEP = 600
METRICS = {"step": 1, "total_steps": 100, "loss": 0.5, "kl": 0.25, "tokens": 4096, "tokens_per_second": 512.0}


class Reporting:
    """What WorkerService needs of a run manager: events go straight into the log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def report(self, run_id: str, event: Event) -> None:
        """Store one event."""
        assert run_id == RUN
        await self._log.append(None, [event])


async def serve(folder: Path) -> None:
    """The daemon's log and its two services, until standard input closes."""
    log = EventLog(Store(folder / "opd.db"))
    runs: Any = Reporting(log)
    gate = Gate(CLIENT, lambda token: RUN if token == WORKER else None)
    server = grpc.aio.server(interceptors=[Border(gate, Home(folder))])
    run_pb2_grpc.add_RunServiceServicer_to_server(RunServicer(runs, log, runs, uploads=runs, roots=runs), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(runs, log, runs), server)
    server.add_insecure_port(address(folder))
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    log.close("the benchmark is over")
    await server.stop(1.0)
    await log.aclose()


async def watch(folder: Path, watchers: int) -> None:
    """Open all watches and one that stalls; answer each line of standard input with the events delivered so far."""
    channels = [grpc.aio.insecure_channel(address(folder), options=[("grpc.use_local_subchannel_pool", 1)])]
    channels *= 1 + watchers // STREAMS_PER_CHANNEL
    delivered, started = [0], asyncio.Semaphore(0)
    header = [("authorization", f"Bearer {CLIENT}")]

    async def follow(number: int) -> None:
        stub = run_pb2_grpc.RunServiceStub(channels[number // STREAMS_PER_CHANNEL])
        async for message in stub.WatchEvents(run_pb2.WatchEventsRequest(), metadata=header):
            if message.HasField("started"):
                started.release()
            delivered[0] += len(message.events.events)

    tasks = [asyncio.create_task(follow(number)) for number in range(watchers)]
    stalled = run_pb2_grpc.RunServiceStub(channels[0]).WatchEvents(run_pb2.WatchEventsRequest(), metadata=header)
    await stalled.read()
    for _ in tasks:
        await started.acquire()
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(delivered[0], flush=True)
    for task in tasks:
        task.cancel()


def address(folder: Path) -> str:
    """The socket of the benchmark's daemon."""
    return f"unix:{folder / 'bench.sock'}"


@dataclass(frozen=True)
class Part:
    """A process of this benchmark that answers on standard output."""

    process: subprocess.Popen[str]

    def ask(self) -> int:
        """Its number now."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def part(*arguments: object) -> Iterator[Part]:
    """This file in another process, in another role; it ends with the block."""
    command = [sys.executable, __file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield Part(process)
    finally:
        process.stdin.close()
        process.wait(60)


class Producer:
    """A worker's side of the stream: one event a call, so that each is known to be safe."""

    def __init__(self, folder: Path) -> None:
        self._channel = grpc.insecure_channel(address(folder), options=[("grpc.use_local_subchannel_pool", 1)])
        channel = grpc.intercept_channel(self._channel, TokenInterceptor(WORKER))
        self._stub = worker_pb2_grpc.WorkerServiceStub(channel)

    def report(self) -> float:
        """Seconds until one event was safe."""
        event = event_to_proto(Event(EventKind.METRICS, RUN, METRICS, datetime.now(UTC)))
        begin = time.perf_counter()
        self._stub.ReportEvents(iter([worker_pb2.ReportEventsRequest(event=event)]))
        return time.perf_counter() - begin

    def steadily(self, seconds: float) -> list[float]:
        """Latencies at `RATE` events a second, whether or not the last one came back in time."""
        due, latencies = time.perf_counter(), []
        end = due + seconds
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            latencies.append(self.report() + max(0.0, time.perf_counter() - due - 1 / RATE))
            due += 1 / RATE
        return latencies


def flat_out(folder: Path, seconds: float) -> int:
    """How many events eight producers bring in."""
    end = time.perf_counter() + seconds

    def produce(_: int) -> int:
        producer, count = Producer(folder), 0
        while time.perf_counter() < end:
            producer.report()
            count += 1
        return count

    with ThreadPoolExecutor(PRODUCERS) as threads:
        return sum(threads.map(produce, range(PRODUCERS)))


def step_seconds(producer: Producer | None) -> float:
    """Time of a step of a synthetic worker, that sends one event beside the computation if it has a producer."""
    left, begin = np.ones((512, 512), np.float32), time.perf_counter()
    sending = threading.Thread(target=producer.report if producer else lambda: None)
    sending.start()
    for _ in range(PRODUCTS_PER_STEP):
        left = left @ left * np.float32(1 / 512)
    sending.join()
    return time.perf_counter() - begin


def reporting_costs(producer: Producer, pairs: int) -> str:
    """Time of a step that reports over that of its neighbour that doesn't; either comes first in every other pair."""
    ratios, seconds = [], []
    for number in range(pairs):
        steps = (producer, None) if number % 2 else (None, producer)
        took = {step: step_seconds(step) for step in steps}
        ratios.append(took[producer] / took[None])
        seconds.append(took[None])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} (half of {pairs} pairs: {low:.3f} to {high:.3f}), steps of {statistics.median(seconds):.2f} s"


def measured(folder: Path, daemon: psutil.Process, watchers: Part | None, seconds: float) -> list[str]:
    """One row: steady latency, then everything at once."""
    producer, idle = Producer(folder), daemon.memory_info().rss
    producer.steadily(1.0)
    latencies = sorted(producer.steadily(seconds))
    before, begin = (watchers.ask() if watchers else 0), time.perf_counter()
    events = flat_out(folder, seconds)
    delivered = (watchers.ask() if watchers else 0) - before
    took = time.perf_counter() - begin
    return [
        f"{1000 * statistics.median(latencies):.1f}",
        f"{1000 * latencies[int(0.99 * len(latencies))]:.1f}",
        f"{events / took:,.0f}",
        f"{delivered / took:,.0f}",
        f"{idle / 2**20:.0f}",
        f"{daemon.memory_info().rss / 2**20:.0f}",
    ]


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
    elif arguments.watch:
        asyncio.run(watch(arguments.watch, arguments.watchers))
    else:
        compare(arguments.watchers, arguments.seconds, arguments.pairs)


def compare(watchers: int, seconds: float, pairs: int) -> None:
    """All three tables."""
    with tempfile.TemporaryDirectory(prefix="opd-") as name, part("--serve", name) as served:
        folder, daemon = Path(name), psutil.Process(served.process.pid)
        producer = Producer(folder)
        rows = [["none", *measured(folder, daemon, None, seconds)]]
        untold = reporting_costs(producer, pairs)
        with part("--watch", name, "--watchers", watchers) as crowd:
            rows.append([f"{watchers} and one stalled", *measured(folder, daemon, crowd, seconds)])
            told = reporting_costs(producer, pairs)
        show(["watchers", "p50 ms", "p99 ms", "events/s in", "events/s out", "MB before", "MB after"], rows)
        print(f"a training step that reports / one that doesn't, with {watchers} watchers: {told}")
        print(f"the same with nobody watching: {untold}")


if __name__ == "__main__":
    main()
