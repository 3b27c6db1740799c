"""Old events are forgotten by age and by size, while everyone writes and watches; the file shrinks."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from opd_daemon.events import EventBatch
from opd_daemon.retention import Retention, retain
from opd_daemon.store import Store
from tests.asynchronous import asynchronous, until
from tests.test_events import NOW, event, event_log
from tests.test_store import log_event, metrics_event

LARGE = 1 << 40


def test_events_are_kept_until_they_are_too_old(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "opd.db")) as store:
        for age in (50, 40, 31, 29, 10):
            store.apply(None, [replace(log_event(), time=NOW - timedelta(days=age))])
        assert Retention(30, LARGE).first_kept(tmp_path / "opd.db", NOW) == 4
        assert Retention(60, LARGE).first_kept(tmp_path / "opd.db", NOW) == 1
        assert Retention(5, LARGE).first_kept(tmp_path / "opd.db", NOW) == 6


def test_a_clock_that_jumped_back_hides_no_young_event(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "opd.db")) as store:
        for age in (1, 100, 0):
            store.apply(None, [replace(log_event(), time=NOW - timedelta(days=age))])
        assert Retention(30, LARGE).first_kept(tmp_path / "opd.db", NOW) == 1


def test_too_many_bytes_leave_the_newest_events(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "opd.db")) as store:
        for _ in range(100):
            store.apply(None, [log_event("x" * 10_000)])
        first = Retention(30, 200_000).first_kept(tmp_path / "opd.db", NOW)
        assert 80 < first < 84
        assert Retention(30, 2_000_000).first_kept(tmp_path / "opd.db", NOW) <= 1


def test_an_empty_store_has_nothing_to_forget(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "opd.db")):
        assert Retention(30, 1).first_kept(tmp_path / "opd.db", NOW) <= 1


@asynchronous
async def test_the_file_shrinks_and_watchers_are_served_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "opd.db"
    async with event_log(tmp_path) as log:
        for _ in range(30):
            await log.append(None, [event("x" * 1000) for _ in range(100)])
        async with aclosing(log.watch()) as items:
            await anext(items)
            compacting = asyncio.create_task(log.compact(2990))
            await log.append(None, [event("young")])
            batch = await anext(items)
            assert isinstance(batch, EventBatch)
            assert not compacting.done()
            await compacting
    with closing(Store(path)) as store:
        assert store.oldest_revision() == 2901  # a batch is never cut
        assert store._value("PRAGMA freelist_count") == 0
    assert path.stat().st_size < 400_000  # of three megabytes


@asynchronous
async def test_forgetting_goes_on_while_the_daemon_runs_and_leaves_metrics(tmp_path: Path) -> None:
    async with event_log(tmp_path) as log:
        keeping = asyncio.create_task(retain(log, tmp_path / "opd.db", Retention(1), period=0.02))
        await log.append(None, [replace(metrics_event(1), time=NOW - timedelta(days=3000))])

        async def forgotten() -> bool:
            return await log.read(Store.oldest_revision) == 2

        await until(forgotten)
        assert len(await log.read(lambda store: store._rows("SELECT * FROM metrics"))) == 1
        keeping.cancel()
