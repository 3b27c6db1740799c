"""The watch keeps its promises: ordered, unique, atomic, reliable, resumable, bookmarkable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.events import Bookmark, EventBatch, EventLog, GaugeReadings, WatchItem, WatchStarted
from opd_daemon.store import Store
from opd_daemon.types import Event, EventKind, Gauges, Run, RunState
from tests.asynchronous import asynchronous

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@asynccontextmanager
async def event_log(path: Path, bookmark_seconds: float = 5.0) -> AsyncIterator[EventLog]:
    log = EventLog(Store(path / "opd.db"), bookmark_seconds=bookmark_seconds)
    try:
        yield log
    finally:
        await log.aclose()


def event(text: str = "", run_id: str = "r1") -> Event:
    return Event(EventKind.LOG, run_id, {"level": "info", "text": text}, NOW)


async def add_run(log: EventLog, run_id: str) -> None:
    run = Run(run_id=run_id, state=RunState.PENDING, config={}, created_at=NOW)
    await log.commit(lambda store: store.insert_run(run, [event("created", run_id)], ""))


async def batches(
    log: EventLog, count: int, after_revision: int | None = 0, run_id: str | None = None
) -> list[EventBatch]:
    """The batches of a watch until at least `count` events have come."""
    found: list[EventBatch] = []
    async with aclosing(log.watch(after_revision, run_id)) as items:
        async for item in items:
            if isinstance(item, EventBatch):
                found.append(item)
            if sum(len(batch.events) for batch in found) >= count:
                break
    return found


def revisions(found: list[EventBatch]) -> list[int]:
    return [entry.revision for batch in found for entry in batch.events]


async def next_of(items: AsyncIterator[WatchItem], kind: type[WatchItem]) -> WatchItem:
    async for item in items:
        if isinstance(item, kind):
            return item
    raise AssertionError("the watch ended")


async def append_many(log: EventLog, writers: int, each: int) -> None:
    async def write(writer: int) -> None:
        for number in range(each):
            await log.append(None, [event(f"{writer}/{number}")])

    await asyncio.gather(*(write(writer) for writer in range(writers)))


@asynchronous
async def test_watch_is_ordered_and_unique_for_every_watcher(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        watchers = [asyncio.create_task(batches(log, 200)) for _ in range(5)]
        await append_many(log, writers=10, each=20)
        for watcher in watchers:
            assert revisions(await watcher) == list(range(1, 201))


@asynchronous
async def test_watch_keeps_the_order_of_each_writer(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=4, each=10)
        texts = [entry.payload["text"] for batch in await batches(log, 40) for entry in batch.events]
        for writer in range(4):
            own = [text for text in texts if text.startswith(f"{writer}/")]
            assert own == [f"{writer}/{number}" for number in range(10)]


@asynchronous
async def test_watch_is_atomic_what_was_stored_together_comes_in_one_batch(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        watcher = asyncio.create_task(batches(log, 600))
        await asyncio.gather(*(log.append(None, [event(f"{group}")] * 6) for group in range(100)))
        for batch in await watcher:
            texts = [entry.payload["text"] for entry in batch.events]
            assert all(texts.count(text) == 6 for text in texts)


@asynchronous
async def test_watch_is_reliable_a_slow_watcher_misses_nothing(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        found: list[int] = []
        async with aclosing(log.watch(0)) as items:
            await append_many(log, writers=10, each=100)
            async for item in items:
                if isinstance(item, EventBatch):
                    found += [entry.revision for entry in item.events]
                    await asyncio.sleep(0.01)
                if len(found) == 1000:
                    break
        assert found == list(range(1, 1001))


@asynchronous
async def test_watch_is_resumable_at_every_cursor(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=2, each=5)
        for cursor in range(10):
            assert revisions(await batches(log, 10 - cursor, cursor)) == list(range(cursor + 1, 11))


@asynchronous
async def test_watch_is_resumable_after_the_daemon_restarted(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=3)
        seen = (await batches(log, 2))[-1].revision
        store_id = log.store_id
    async with event_log(tmp_path) as log:
        assert log.store_id == store_id
        await log.append(None, [event("new")])
        async with aclosing(log.watch(seen, expected_store_id=store_id)) as items:
            batch = await next_of(items, EventBatch)
        assert isinstance(batch, EventBatch)
        assert revisions([batch]) == list(range(seen + 1, 5))


@asynchronous
async def test_watch_is_bookmarkable_when_idle(tmp_path: Path) -> None:
    async with event_log(tmp_path, bookmark_seconds=0.05) as log:
        await log.append(None, [event()])
        async with aclosing(log.watch()) as items:
            assert await next_of(items, Bookmark) == Bookmark(1)
            assert await next_of(items, Bookmark) == Bookmark(1)


@asynchronous
async def test_watch_is_bookmarkable_when_its_filter_matches_nothing(tmp_path: Path) -> None:
    async with event_log(tmp_path, bookmark_seconds=0.1) as log:
        await add_run(log, "quiet")
        async with aclosing(log.watch(1, "quiet")) as items:
            assert isinstance(await anext(items), WatchStarted)
            busy = asyncio.create_task(append_many(log, writers=1, each=100))
            bookmark = await next_of(items, Bookmark)
            assert isinstance(bookmark, Bookmark)
            assert bookmark.revision > 1
            await busy
        assert revisions(await batches(log, 1, 0, "quiet")) == [1]


@asynchronous
async def test_a_bookmark_is_a_cursor_that_loses_nothing(tmp_path: Path) -> None:
    async with event_log(tmp_path, bookmark_seconds=0.05) as log:
        await log.append(None, [event()])
        async with aclosing(log.watch(0)) as items:
            bookmark = await next_of(items, Bookmark)
        assert isinstance(bookmark, Bookmark)
        await log.append(None, [event("later")])
        assert revisions(await batches(log, 1, bookmark.revision)) == [2]


@asynchronous
async def test_a_filter_passes_exactly_the_events_of_its_run(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        for run_id in ("a", "b"):
            await add_run(log, run_id)
        for number in range(10):
            await log.append(None, [event(str(number), "ab"[number % 2])])
        found = await batches(log, 6, 0, "a")
        assert [entry.run_id for batch in found for entry in batch.events] == ["a"] * 6


@asynchronous
async def test_the_first_item_says_which_log_this_is(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=3)
        async with aclosing(log.watch()) as items:
            assert await anext(items) == WatchStarted(log.store_id, 3, 1)


@asynchronous
async def test_without_a_cursor_only_new_events_come(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await log.append(None, [event("old")])
        async with aclosing(log.watch()) as items:
            await anext(items)
            await log.append(None, [event("new")])
            batch = await next_of(items, EventBatch)
        assert isinstance(batch, EventBatch)
        assert [entry.payload["text"] for entry in batch.events] == ["new"]


@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        (-1, Reason.INVALID_REQUEST),
        (2**63, Reason.INVALID_REQUEST),
        (4, Reason.REVISION_IN_FUTURE),
        (2**63 - 1, Reason.REVISION_IN_FUTURE),
    ],
)
@asynchronous
async def test_a_cursor_that_means_nothing_is_refused(tmp_path: Path, cursor: int, reason: Reason) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=3)
        with pytest.raises(OpdError) as caught:
            await anext(log.watch(cursor))
        assert caught.value.reason is reason


@asynchronous
async def test_a_compacted_cursor_is_refused_and_told_where_the_log_begins(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=5)
        await log.compact(4)
        with pytest.raises(OpdError) as caught:
            await anext(log.watch(2))
        assert caught.value.reason is Reason.REVISION_COMPACTED
        assert caught.value.metadata["oldest_revision"] == "4"
        assert revisions(await batches(log, 2, 3)) == [4, 5]
        assert revisions(await batches(log, 2, 0)) == [4, 5]


@asynchronous
async def test_compacting_what_a_watcher_has_not_read_yet_is_no_silent_gap(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        await append_many(log, writers=1, each=5)
        items = log.watch(1)
        await anext(items)
        await log.compact(4)
        with pytest.raises(OpdError) as caught:
            await anext(items)
        assert caught.value.reason is Reason.REVISION_COMPACTED


@asynchronous
async def test_a_cursor_from_another_store_is_refused(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        with pytest.raises(OpdError) as caught:
            await anext(log.watch(0, expected_store_id="another"))
        assert caught.value.reason is Reason.STORE_CHANGED
        assert caught.value.metadata["store_id"] == log.store_id


@asynchronous
async def test_watching_an_unknown_run_is_refused(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        with pytest.raises(OpdError) as caught:
            await anext(log.watch(0, "nobody"))
        assert caught.value.reason is Reason.RUN_NOT_FOUND


@asynchronous
async def test_a_watch_ends_with_shutting_down_after_the_last_event(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        items = log.watch(0)
        await anext(items)
        await log.append(None, [event("last")])
        log.close("the daemon stops")
        assert isinstance(await anext(items), EventBatch)
        with pytest.raises(OpdError) as caught:
            await anext(items)
        assert caught.value.reason is Reason.SHUTTING_DOWN


@asynchronous
async def test_an_idle_watch_ends_at_once_when_the_daemon_stops(tmp_path: Path) -> None:
    async with event_log(tmp_path, bookmark_seconds=1000) as log:
        items = log.watch()
        await anext(items)
        waiting = asyncio.create_task(next_of(items, EventBatch))
        await asyncio.sleep(0.05)
        log.close("the daemon stops")
        with pytest.raises(OpdError, match="the daemon stops"):
            await waiting


@asynchronous
async def test_only_the_newest_readings_reach_a_watcher(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        items = log.watch()
        await anext(items)
        for value in (1.0, 2.0, 3.0):
            log.publish_gauges(Gauges("r1", NOW, {"tokens_per_second": value}))
        readings = await next_of(items, GaugeReadings)
        assert isinstance(readings, GaugeReadings)
        assert readings.gauges.values == {"tokens_per_second": 3.0}
        await log.append(None, [event()])
        assert isinstance(await anext(items), EventBatch)


@asynchronous
async def test_an_empty_heartbeat_does_not_replace_readings(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        log.publish_gauges(Gauges("r1", NOW, {"memory": 1.0}))
        log.publish_gauges(Gauges("r1", NOW, {}))
        async with aclosing(log.watch()) as items:
            readings = await next_of(items, GaugeReadings)
        assert isinstance(readings, GaugeReadings)
        assert readings.gauges.values == {"memory": 1.0}


@asynchronous
async def test_append_returns_only_when_another_reader_can_see_it(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        [stored] = await log.append(None, [event("safe")])
        other = Store(tmp_path / "opd.db")
        assert other.events_after(0)[0] == [stored]
        other.close()


@asynchronous
async def test_a_caller_who_gives_up_takes_nothing_with_him(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        impatient = asyncio.create_task(log.append(None, [event("impatient")]))
        patient = asyncio.create_task(log.append(None, [event("patient")]))
        await asyncio.sleep(0)
        impatient.cancel()
        assert [entry.payload["text"] for entry in await patient] == ["patient"]
        assert await log.revision() == 2


@asynchronous
async def test_listeners_hear_every_event_in_order_even_when_one_of_them_fails(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        heard: list[int] = []

        def fail(_: object) -> None:
            raise RuntimeError

        log.add_listener(fail)
        log.add_listener(lambda events: heard.extend(entry.revision for entry in events))
        await append_many(log, writers=5, each=5)
        assert heard == list(range(1, 26))
