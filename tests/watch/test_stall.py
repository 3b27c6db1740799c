"""A client that watches and doesn't read, over the wire: neither who writes nor who reads notices, nor the memory.

`OPD_SOAK=1` stalls for an hour; `OPD_STALL_SECONDS` for as long as it says.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError
from opd_daemon.home import Home
from opd_daemon.types import Event
from opd_daemon.v1 import run_pb2, run_pb2_grpc
from tests.bad_inputs.soak import SOAK, show

STALL_SECONDS = float(os.environ.get("OPD_STALL_SECONDS") or (3600 if SOAK else 3))
EVENTS_PER_SECOND = 20
WARM = 50
# What Python, SQLite and gRPC take more of once they have worked, whatever the length of the stall.
WITHIN = 40 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with LocalDaemon(Home(tmp_path / "home")) as started:
        yield started


def told(client: Client, missing: Path, count: int) -> list[float]:
    """Seconds that each of so many events took until it was acknowledged: loads that fail, and what undoes them."""
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        if number % 2:
            client.unload_teacher()
        else:
            with pytest.raises(OpdError):
                list(client.load_teacher(str(missing)))
        seconds.append(time.perf_counter() - began)
        time.sleep(max(0.0, 1 / EVENTS_PER_SECOND - seconds[-1]))
    return seconds


def revisions(client: Client, last: int, found: list[int]) -> None:
    """Follow from the start until the event `last`."""
    for item in client.watch(0):
        if isinstance(item, Event):
            found.append(item.revision)
            if item.revision == last:
                return


@pytest.mark.timeout(3 * STALL_SECONDS + 300)
def test_a_stalled_reader_costs_nobody_anything(daemon: LocalDaemon, tmp_path: Path) -> None:
    missing, count = tmp_path / "home" / "missing", int(STALL_SECONDS * EVENTS_PER_SECOND)
    with daemon.client() as client, daemon.client() as slow, daemon.client() as other:
        alone = told(client, missing, WARM)
        stub = run_pb2_grpc.RunServiceStub(slow.channel)
        stalled = iter(stub.WatchEvents(run_pb2.WatchEventsRequest(after_revision=0)))
        next(stalled)
        seen: list[int] = []
        reader = threading.Thread(target=revisions, args=(other, WARM + count, seen), daemon=True)
        reader.start()
        process = psutil.Process(daemon.pid)
        before = process.memory_info().rss
        beside = told(client, missing, count)
        grown = process.memory_info().rss - before
        reader.join(60)
        assert seen == list(range(1, WARM + count + 1))
        show(
            f"{count} events in {STALL_SECONDS:.0f} s beside a stalled reader: acknowledged after "
            f"{1e3 * statistics.median(beside):.1f} ms in the median (alone {1e3 * statistics.median(alone):.1f}), "
            f"memory {grown / 2**20:+.1f} MB"
        )
        assert grown < WITHIN
        behind: list[int] = []
        while not behind or behind[-1] < WARM + count:
            behind += [event.revision for event in next(stalled).events.events]
        assert behind == list(range(1, WARM + count + 1))
