"""A crowd of watchers, one of them stalled, and all of them coming back at once: nobody who writes has to wait."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from opd_daemon import turns
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.events import Bookmark, EventBatch, EventLog, WatchStarted
from opd_daemon.store import Store
from opd_daemon.turns import Turns
from opd_daemon.types import Gauges
from tests.asynchronous import asynchronous
from tests.bad_inputs.soak import SOAK
from tests.test_events import NOW, add_run, append_many, event, event_log

CROWD = 1000 if SOAK else 200


async def followed(log: EventLog, last: int, after_revision: int | None = 0) -> list[int]:
    """Revisions a watch sees until `last`."""
    found: list[int] = []
    async with aclosing(log.watch(after_revision)) as items:
        async for item in items:
            if isinstance(item, EventBatch):
                found += [entry.revision for entry in item.events]
            if found and found[-1] >= last:
                break
    return found


@asynchronous
async def test_a_crowd_reads_the_log_once_and_not_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=3)
        reads = []
        real = Store.events_after

        def counted(store: Store, *arguments: int | None) -> object:
            reads.append(arguments)
            return real(store, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Store, "events_after", counted)
        crowd = await asyncio.gather(*(followed(log, 3) for _ in range(CROWD)))
        assert crowd == [[1, 2, 3]] * CROWD
        assert len(reads) == 1


@asynchronous
async def test_whoever_writes_is_not_behind_the_whole_crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 30.0)
    async with event_log(tmp_path) as log:
        ready = asyncio.Semaphore(0)
        told: list[int] = []

        async def watcher() -> None:
            async with aclosing(log.watch()) as items:
                async for item in items:
                    if isinstance(item, WatchStarted):
                        ready.release()
                    else:
                        told.append(1)

        crowd = [asyncio.create_task(watcher()) for _ in range(CROWD)]
        for _ in crowd:
            await ready.acquire()
        await log.append(None, [event("first")])
        while not told:  # noqa: ASYNC110 - whatever the machine takes for it
            await asyncio.sleep(0.01)
        await log.append(None, [event("second")])
        # The second is safe while most of the crowd have not even heard of the first.
        assert len(told) <= CROWD / 10
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)


@asynchronous
async def test_a_stalled_watcher_holds_no_memory_and_goes_on_where_it_was(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        items = log.watch(0)
        await anext(items)
        await append_many(log, writers=4, each=50)
        before = psutil.Process().memory_info().rss
        for _ in range(100):
            await log.append(None, [event("x" * 10_000) for _ in range(20)])
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 10 * 2**20  # of 20 MB that were written
        assert (await anext(items)).events[0].revision == 1  # type: ignore[union-attr]
        await items.aclose()


@asynchronous
async def test_a_storm_of_resumptions_gets_everything_while_others_write(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=10, each=100)
    async with event_log(tmp_path) as log:
        storm = [asyncio.create_task(followed(log, 1010, after_revision=number % 7)) for number in range(CROWD)]
        await append_many(log, writers=1, each=10)
        for number, found in enumerate(await asyncio.gather(*storm)):
            assert found == list(range(number % 7 + 1, 1011))


@asynchronous
async def test_turns_are_given_in_order_and_a_few_at_a_time() -> None:
    queue, served = Turns(), []

    async def one(number: int) -> None:
        await queue.take()
        served.append(number)

    waiting = [asyncio.create_task(one(number)) for number in range(CROWD)]
    while not served:  # noqa: ASYNC110 - a turn of the loop at a time is the point
        await asyncio.sleep(0)
    assert len(served) <= CROWD / 10
    await asyncio.gather(*waiting)
    assert served == list(range(CROWD))


@asynchronous
async def test_whoever_gave_up_waiting_takes_no_turn_from_others() -> None:
    queue = Turns()
    gone = [asyncio.create_task(queue.wait(1000)) for _ in range(CROWD)]
    here = asyncio.create_task(queue.wait(1000))
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    queue.announce()
    await asyncio.wait_for(here, 5)


@asynchronous
async def test_one_watch_too_many_is_refused_with_the_cure_and_a_worker_never(tmp_path: Path) -> None:
    log = EventLog(Store(tmp_path / "opd.db"), max_watchers=2)
    open_ones = [log.watch(), log.watch()]
    for items in open_ones:
        await anext(items)
    with pytest.raises(OpdError, match="--max-watchers") as caught:
        await anext(log.watch())
    assert caught.value.reason is Reason.TOO_MANY_WATCHERS
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    worker = log.watch(refusable=False)
    assert isinstance(await anext(worker), WatchStarted)
    assert log.watchers == 3
    for items in (*open_ones, worker):
        await items.aclose()
    assert log.watchers == 0
    again = log.watch()
    assert isinstance(await anext(again), WatchStarted)
    await again.aclose()
    await log.aclose()


@asynchronous
async def test_a_watch_that_was_refused_is_not_counted(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        for cursor in (-1, 99):
            with pytest.raises(OpdError):
                await anext(log.watch(cursor))
        assert log.watchers == 0


@asynchronous
async def test_readings_of_other_runs_do_not_reach_a_filtered_watch(tmp_path: Path) -> None:
    async with event_log(tmp_path, bookmark_seconds=0.05) as log:
        await add_run(log, "quiet")
        async with aclosing(log.watch(1, "quiet")) as items:
            await anext(items)
            log.publish_gauges(Gauges("other", NOW, {"memory": 1.0}))
            assert await anext(items) == Bookmark(1)
