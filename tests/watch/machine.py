"""A log that is written, watched, compacted, restarted and killed in any order, beside a list that can't fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from opd_daemon.errors import OpdError, Reason
from opd_daemon.events import EventLog, WatchItem
from opd_daemon.store import Store
from opd_daemon.store_check import check_store
from opd_daemon.types import Event, EventKind, Run, RunState
from tests.watch.guarantees import History, Reader

T = TypeVar("T")

NOW = datetime(2026, 11, 23, tzinfo=UTC)
RUNS = ("a", "b", "c")
BOOKMARK_SECONDS = 0.004
MOST_READERS = 8
# What is flushed is not the point here, only when: where there is a folder in memory, it is faster.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108

runs = st.sampled_from(RUNS)
filters = st.sampled_from((None, *RUNS))
sizes = st.integers(1, 5)
anyone = st.integers(0, 10_000)
batches = st.lists(st.tuples(runs, sizes), min_size=1, max_size=6)

figures: Counter[str] = Counter()


class WatchMachine(RuleBasedStateMachine):
    """Draws never depend on what the store did, so that a failure is replayed as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._folder = Path(tempfile.mkdtemp(prefix="opd-watch-", dir=MEMORY))
        self._generation = 0
        self._texts = 0
        self._history = History()
        self._log = self._do(self._opened(self._path()))
        self._readers: list[Reader] = []
        self._watches: dict[int, AsyncGenerator[WatchItem, None]] = {}
        self._cursors = [0]
        self._do(self._add_runs())
        for run_id in (None, "a"):
            self.watch(run_id, 0)

    # Writing

    @rule(run_id=runs, size=sizes)
    def append(self, run_id: str, size: int) -> None:
        self._step("append")
        self._history.add(self._do(self._log.append(None, self._events(run_id, size))))

    @rule(together=batches)
    def append_at_once(self, together: list[tuple[str, int]]) -> None:
        self._step("append_at_once")
        self._remember(self._do(self._gather([self._append(*batch) for batch in together])))

    @rule(size=sizes)
    def append_of_several_runs(self, size: int) -> None:
        self._step("append_of_several_runs")
        events = [event for run_id in RUNS for event in self._events(run_id, size)]
        self._history.add(self._do(self._log.append(None, events)))

    @rule(together=batches)
    def append_while_all_read(self, together: list[tuple[str, int]]) -> None:
        self._step("append_while_all_read")

        async def both() -> tuple[list[list[Event]], list[WatchItem | OpdError]]:
            writing = self._gather([self._append(*batch) for batch in together])
            reading = self._gather([self._next(number) for number in list(self._watches)])
            return await asyncio.gather(writing, reading)

        numbers = list(self._watches)
        stored, items = self._do(both())
        self._remember(stored)
        for number, item in zip(numbers, items, strict=True):
            self._check(number, item)

    # Watching

    @rule(run_id=filters, place=anyone)
    def watch(self, run_id: str | None, place: int) -> None:
        self._step("watch")
        cursor = self._cursors[place % len(self._cursors)]
        reader = Reader(run_id, cursor)
        if len(self._watches) < MOST_READERS:
            self._readers.append(reader)
            self._connect(len(self._readers) - 1)

    @rule(run_id=filters)
    def watch_from_now(self, run_id: str | None) -> None:
        self._step("watch_from_now")
        if len(self._watches) < MOST_READERS:
            self._readers.append(Reader(run_id, self._history.newest))
            self._connect(len(self._readers) - 1, absent=True)

    @rule(place=anyone)
    def read(self, place: int) -> None:
        self._step("read")
        if self._watches:
            number = list(self._watches)[place % len(self._watches)]
            self._check(number, self._do(self._next(number)))

    @rule()
    def read_everything(self) -> None:
        self._step("read_everything")
        for number in list(self._watches):
            while number in self._watches and self._readers[number].cursor < self._history.newest:
                self._check(number, self._do(self._next(number)))

    @rule(place=anyone)
    def read_until_a_bookmark(self, place: int) -> None:
        self._step("read_until_a_bookmark")
        if self._watches:
            number = list(self._watches)[place % len(self._watches)]
            reader = self._readers[number]
            before = reader.bookmarks
            while self._readers[number] is reader and reader.bookmarks == before:
                self._check(number, self._do(self._next(number)))

    @rule(place=anyone)
    def drop(self, place: int) -> None:
        self._step("drop")
        if self._watches:
            self._disconnect(list(self._watches)[place % len(self._watches)])

    @rule(place=anyone)
    def resume(self, place: int) -> None:
        self._step("resume")
        dropped = [number for number in range(len(self._readers)) if number not in self._watches]
        if dropped and len(self._watches) < MOST_READERS:
            self._connect(dropped[place % len(dropped)])

    @rule(place=st.sampled_from((-(2**63), -1, 0, 2**63 - 1, 2**63)))
    def watch_from_the_ends_of_numbers(self, place: int) -> None:
        self._step("edges")
        expected = Reason.INVALID_REQUEST if not 0 <= place < 2**63 else Reason.REVISION_IN_FUTURE
        assert self._outcome(place) is (None if place == 0 else expected)

    @rule(beyond=st.sampled_from((0, 1, 2, 1000)))
    def watch_from_now_on_and_beyond(self, beyond: int) -> None:
        self._step("edges")
        assert self._outcome(self._history.newest + beyond) is (Reason.REVISION_IN_FUTURE if beyond else None)

    @rule(before=st.integers(0, 3))
    def watch_from_the_edge_of_compaction(self, before: int) -> None:
        self._step("edges")
        cursor = self._history.oldest - 1 - before
        gone = cursor < self._history.oldest - 1
        if cursor > 0:
            assert self._outcome(cursor) is (Reason.REVISION_COMPACTED if gone else None)

    @rule()
    def watch_another_store(self) -> None:
        self._step("edges")
        assert self._outcome(0, "another") is Reason.STORE_CHANGED

    # What happens to the log

    @rule(place=anyone)
    def compact(self, place: int) -> None:
        self._step("compact")
        before = place % (self._history.newest + 2)
        self._do(self._log.compact(before))
        while self._history.oldest < before:  # a batch is forgotten once all of it may be
            end = self._history.events[self._history.oldest - 1].batch_end
            if end >= before:
                break
            self._history.oldest = end + 1

    @rule()
    def restart(self) -> None:
        """Whoever still watches is told everything, then that the daemon stops."""
        self._step("restart")
        self._log.close("the daemon stops")
        for number in list(self._watches):
            item: WatchItem | OpdError | None = None
            while number in self._watches:
                item = self._do(self._next(number))
                self._check(number, item)
            assert isinstance(item, OpdError)
            assert item.reason in (Reason.SHUTTING_DOWN, Reason.REVISION_COMPACTED)
            if item.reason is Reason.SHUTTING_DOWN:
                reader = self._readers[number]
                assert self._history.between(reader.cursor, self._history.newest, reader.run_id) == []
        self._do(self._log.aclose())
        self._log = self._do(self._opened(self._path()))
        self._resume_all()

    @rule(together=batches, delay=st.integers(0, 8))
    def kill(self, together: list[tuple[str, int]], delay: int) -> None:
        """A copy of the files at any moment is what a kill leaves. What was acknowledged or seen is in it."""
        self._step("kill")
        source = self._path()
        self._generation += 1
        acknowledged, stored = self._do(self._copied_while_writing(source, together, delay / 2000))
        for number in list(self._watches):
            self._disconnect(number)
        self._do(self._log.aclose())
        store_id = self._log.store_id
        self._remember(stored)
        self._log = self._do(self._opened(self._path()))
        survived = self._do(self._log.revision())
        assert self._log.store_id == store_id
        assert acknowledged <= survived <= self._history.newest
        assert survived == 0 or self._history.events[survived - 1].batch_end == survived
        del self._history.events[survived:]
        for reader in self._readers:
            assert reader.cursor <= survived
        self._resume_all()

    def teardown(self) -> None:
        for number in list(self._watches):
            self._disconnect(number)
        self._do(self._log.aclose())
        assert check_store(self._path()).faults == ()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        shutil.rmtree(self._folder)
        figures["bookmarks"] += sum(reader.bookmarks for reader in self._readers)
        figures["resumed"] += sum(reader.resumed for reader in self._readers)
        figures["events read"] += sum(len(reader.seen) for reader in self._readers)
        figures["events stored"] += self._history.newest

    # How it is done

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, 5.0))

    def _step(self, name: str) -> None:
        figures["steps"] += 1
        figures[name] += 1

    def _path(self) -> Path:
        return self._folder / str(self._generation) / "opd.db"

    async def _opened(self, path: Path) -> EventLog:
        return EventLog(Store(path), bookmark_seconds=BOOKMARK_SECONDS)

    async def _add_runs(self) -> None:
        for run_id in RUNS:
            run = Run(run_id=run_id, state=RunState.PENDING, config={}, created_at=NOW)
            [event] = self._events(run_id, 1)
            stored = await self._log.commit(lambda store, run=run, event=event: store.insert_run(run, [event], ""))
            self._history.add([Event(event.kind, run_id, event.payload, NOW, stored.revision)])

    def _events(self, run_id: str, size: int) -> list[Event]:
        self._texts += size
        # The clock runs backwards: nothing may depend on it.
        time = NOW - timedelta(hours=self._texts)
        return [Event(EventKind.LOG, run_id, {"text": str(self._texts - place)}, time) for place in range(size)]

    async def _append(self, run_id: str, size: int) -> list[Event]:
        return await self._log.append(None, self._events(run_id, size))

    async def _gather(self, work: list[Coroutine[Any, Any, T]]) -> list[T]:
        return list(await asyncio.gather(*work))

    def _remember(self, stored: list[list[Event]]) -> None:
        for batch in sorted(stored, key=lambda batch: batch[0].revision):
            self._history.add(batch)

    async def _copied_while_writing(
        self, source: Path, together: list[tuple[str, int]], delay: float
    ) -> tuple[int, list[list[Event]]]:
        """The last revision that was acknowledged when the copy began, and everything that was stored in the end."""
        writing = [asyncio.create_task(self._append(*batch)) for batch in together]
        await asyncio.sleep(delay)
        done = [task.result()[-1].revision for task in writing if task.done()]
        seen = await self._log.revision()  # watchers may have been told up to here
        copy = self._path()
        copy.parent.mkdir()
        for name in (source.name, f"{source.name}-wal"):  # the index in -shm is rebuilt
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(source.with_name(name), copy.with_name(name))
        return max([seen, *done]), [await task for task in writing]

    def _connect(self, number: int, *, absent: bool = False) -> None:
        reader = self._readers[number]
        after = None if absent else reader.cursor
        watch = self._log.watch(after, reader.run_id, expected_store_id=self._log.store_id)
        self._watches[number] = watch
        item = self._do(self._next(number))
        if isinstance(item, OpdError):
            assert reader.cursor > 0  # 0 is never too old
            self._check(number, item)
        else:
            reader.resumable(item, self._log.store_id, self._history)

    def _resume_all(self) -> None:
        """The storm after a restart: everyone goes on where he was."""
        for number in range(len(self._readers))[-MOST_READERS:]:
            self._connect(number)

    def _disconnect(self, number: int) -> None:
        self._do(self._watches.pop(number).aclose())

    async def _next(self, number: int) -> WatchItem | OpdError:
        try:
            return await anext(self._watches[number])
        except OpdError as error:
            return error

    def _check(self, number: int, item: WatchItem | OpdError) -> None:
        reader = self._readers[number]
        if not isinstance(item, OpdError):
            reader.told(item, self._history, self._history.oldest)
            self._cursors.append(reader.cursor)
            return
        del self._watches[number]
        if item.reason is Reason.REVISION_COMPACTED:
            assert reader.cursor < self._history.oldest - 1
            assert item.metadata["oldest_revision"] == str(self._history.oldest)
            # What a client does then: list, and watch from the revision of that answer.
            self._readers[number] = Reader(reader.run_id, self._history.newest)
        else:
            assert item.reason is Reason.SHUTTING_DOWN

    def _outcome(self, cursor: int, store_id: str = "") -> Reason | None:
        async def attempt() -> Reason | None:
            async with contextlib.aclosing(self._log.watch(cursor, expected_store_id=store_id)) as items:
                try:
                    await anext(items)
                except OpdError as error:
                    return error.reason
            return None

        return self._do(attempt())
