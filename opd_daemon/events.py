"""The event log and its watchers.

There is one durable log and no queue per watcher: a watcher holds a cursor, reads the store from there in batches and
waits for the log to grow. So a slow watcher costs nothing, and one that comes back goes on exactly where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from opd_daemon.errors import OpdError, Reason, invalid
from opd_daemon.failpoints import hit
from opd_daemon.gauges import GaugeBoard
from opd_daemon.store import PAGE, Store, run_not_found
from opd_daemon.turns import Turns
from opd_daemon.types import Event, Gauges, Run

logger = logging.getLogger(__name__)

T = TypeVar("T")

BOOKMARK_SECONDS = 5.0
MAX_REVISION = 2**63 - 1
MAX_WATCHERS = 4000
# Takes the store about 10 ms.
FORGOTTEN_AT_ONCE = 1000
# Of up to `PAGE` events each. A crowd moves together, so a few places are enough for it.
SHARED_PAGES = 8


@dataclass(frozen=True, slots=True)
class WatchStarted:
    """First item of every watch: which log this is, its newest revision and the oldest one still kept."""

    store_id: str
    revision: int
    oldest_revision: int


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events in order, and the cursor after them."""

    events: tuple[Event, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Nothing (more) for this watch up to here: a sign of life and a fresh cursor."""

    revision: int


@dataclass(frozen=True, slots=True)
class GaugeReadings:
    """Newest readings of one run or, with an empty run_id, of the daemon."""

    gauges: Gauges


WatchItem = WatchStarted | EventBatch | Bookmark | GaugeReadings


@dataclass(frozen=True, slots=True)
class _Commit:
    action: Callable[[Store], Any]
    done: asyncio.Future[Any]


class EventLog:
    """The one owner of a store: writes are grouped into durable transactions, reads and writes run on one thread."""

    def __init__(
        self, store: Store, *, bookmark_seconds: float = BOOKMARK_SECONDS, max_watchers: int = MAX_WATCHERS
    ) -> None:
        self.store_id = store.store_id
        self._store = store
        self._bookmark_seconds = bookmark_seconds
        self._thread = ThreadPoolExecutor(1, "store")
        self._revision = store.newest_revision()
        self._oldest = store.oldest_revision()
        self._waiting: list[_Commit] = []
        self._writer: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._max_watchers = max_watchers
        self._watchers = 0
        self._gauges = GaugeBoard()
        self._turns = Turns()
        self._reading = asyncio.Lock()
        self._pages: dict[tuple[int, str | None, int, int], EventBatch] = {}
        self._closed = ""

    async def revision(self) -> int:
        """Revision of the newest event that watchers may see: what is read after this is at least that new."""
        return self._revision

    def add_listener(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call `listener` on the loop with the events of each commit, in order. It must not block."""
        self._listeners.append(listener)

    # Writing and reading the store

    async def append(self, run: Run | None, events: Sequence[Event]) -> list[Event]:
        """Store a run's new state together with its events; returns once they are safe, with their revisions."""
        return await self.commit(lambda store: store.write(run, events))

    async def commit(self, action: Callable[[Store], T]) -> T:
        """Run `action` inside a durable transaction, which it may share with others that came at the same time.

        Raises what the action raised, in which case nothing of it was stored, or DISK_FULL.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Commit(action, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        # The writer goes on for the others when one caller gives up.
        return await asyncio.shield(done)

    async def read(self, query: Callable[[Store], T]) -> T:
        """Ask the store something, on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._store.ask, query)

    async def compact(self, before_revision: int) -> None:
        """Forget events older than `before_revision` and shrink the file, in pieces so that nobody waits for it."""
        before = min(before_revision, self._revision + 1)
        for edge in (*range(self._oldest + FORGOTTEN_AT_ONCE, before, FORGOTTEN_AT_ONCE), before):
            self._oldest = await self.read(partial(Store.compact, before_revision=edge))
        while await self.read(Store.shrink):
            pass

    async def _write(self) -> None:
        # While one group is flushed to the disk the next one gathers: that is the whole group commit.
        while self._waiting:
            group, self._waiting = self._waiting, []
            actions = [entry.action for entry in group]
            try:
                outcomes, events = await self.read(partial(_write_group, actions))
            except Exception as fault:  # noqa: BLE001 - handed to everyone who waits for this group
                outcomes, events = [fault] * len(group), []
            hit("events.publish")
            self._publish(events)
            for entry, outcome in zip(group, outcomes, strict=True):
                _settle(entry.done, outcome)
        self._writer = None

    def _publish(self, events: Sequence[Event]) -> None:
        if not events:
            return
        self._revision = events[-1].revision
        self._turns.announce()
        for listener in self._listeners:
            try:
                listener(events)
            except Exception:
                logger.exception("a listener failed")

    # Watching

    @property
    def watchers(self) -> int:
        """How many watches are open."""
        return self._watchers

    async def watch(
        self,
        after_revision: int | None = None,
        run_id: str | None = None,
        *,
        expected_store_id: str = "",
        refusable: bool = True,
    ) -> AsyncGenerator[WatchItem, None]:
        """Follow the log from a cursor: exclusive; 0 from the oldest kept, None from now on.

        Items: first `WatchStarted`; then events in order, none twice, none left out, those that were stored together
        in one batch; a bookmark when nothing came for a while; readings of gauges as they change.

        Raises:
            OpdError: STORE_CHANGED, REVISION_IN_FUTURE, REVISION_COMPACTED, RUN_NOT_FOUND, INVALID_REQUEST;
                TOO_MANY_WATCHERS, unless it isn't `refusable`; at the end SHUTTING_DOWN.
        """
        if refusable and self._watchers >= self._max_watchers:
            raise _crowded(self._watchers)
        self._watchers += 1
        try:
            cursor = await self._start(after_revision, run_id, expected_store_id)
            yield WatchStarted(self.store_id, self._revision, self._oldest)
            async for item in self._follow(cursor, run_id):
                yield item
        finally:
            self._watchers -= 1

    async def _follow(self, cursor: int, run_id: str | None) -> AsyncGenerator[WatchItem, None]:
        now = asyncio.get_running_loop().time
        seen, spoke = 0, now()
        while True:
            if cursor < self._revision or seen < self._gauges.number:
                await self._turns.take()
            elif self._closed:
                raise OpdError(Reason.SHUTTING_DOWN, self._closed)
            else:
                await self._turns.wait(self._bookmark_seconds - (now() - spoke))
            readings, seen = self._gauges.since(seen, run_id), self._gauges.number
            batch = EventBatch((), cursor)
            if cursor < self._revision:
                batch = await self._page(cursor, run_id)
                cursor = batch.revision
            if batch.events:
                yield batch
                spoke = now()
            for gauges in readings:
                yield GaugeReadings(gauges)
            if now() - spoke >= self._bookmark_seconds:
                yield Bookmark(cursor)
                spoke = now()

    async def _start(self, after_revision: int | None, run_id: str | None, expected_store_id: str) -> int:
        if self._closed:
            raise OpdError(Reason.SHUTTING_DOWN, self._closed)
        if expected_store_id and expected_store_id != self.store_id:
            message = (
                f"the daemon's store is {self.store_id}, not {expected_store_id}: start again with after_revision 0"
            )
            raise OpdError(Reason.STORE_CHANGED, message, store_id=self.store_id, expected_store_id=expected_store_id)
        if run_id and not await self.read(lambda store: store.has_run(run_id)):
            raise run_not_found(run_id)
        if after_revision is None:
            return self._revision
        self._check_cursor(after_revision)
        return max(after_revision, self._oldest - 1)

    def _check_cursor(self, cursor: int) -> None:
        if not 0 <= cursor <= MAX_REVISION:
            raise invalid("after_revision", f"{cursor}: use 0 for everything kept, or the revision last seen")
        if cursor > self._revision:
            message = f"after_revision {cursor} is in the future: the newest revision is {self._revision}"
            raise self._wrong_cursor(Reason.REVISION_IN_FUTURE, message, cursor)
        if 0 < cursor < self._oldest - 1:
            raise self._compacted(cursor)

    async def _page(self, cursor: int, run_id: str | None) -> EventBatch:
        """What comes after a cursor. Watchers at the same place get the same object, read once.

        One page is read at a time: whoever wants to write waits behind one read, not behind those of a crowd.
        """
        place = (cursor, run_id, self._oldest, self._revision)
        async with self._reading:
            if place not in self._pages:
                self._pages[place] = await self._read_page(cursor, run_id)
                if len(self._pages) > SHARED_PAGES:
                    del self._pages[next(iter(self._pages))]
            return self._pages[place]

    async def _read_page(self, cursor: int, run_id: str | None) -> EventBatch:
        # Events may be forgotten while a watcher sleeps: that must never look like silence.
        (events, after), oldest = await self.read(
            lambda store: (store.events_after(cursor, run_id, PAGE), store.oldest_revision())
        )
        if cursor < oldest - 1:
            raise self._compacted(cursor)
        return EventBatch(tuple(events), after)

    def _compacted(self, cursor: int) -> OpdError:
        message = (
            f"events after revision {cursor} are gone, the oldest kept is {self._oldest}: "
            "list the runs, then watch after the revision of that answer"
        )
        return self._wrong_cursor(Reason.REVISION_COMPACTED, message, cursor)

    def _wrong_cursor(self, reason: Reason, message: str, cursor: int) -> OpdError:
        return OpdError(reason, message, after_revision=cursor, revision=self._revision, oldest_revision=self._oldest)

    # Gauges

    def publish_gauges(self, gauges: Gauges) -> None:
        """Replace a run's readings; watchers see the newest ones only. Empty readings are a mere sign of life."""
        if gauges.values:
            self._gauges.put(gauges)
            self._turns.announce()

    def forget_gauges(self, run_id: str) -> None:
        """A run that rests has no readings."""
        self._gauges.forget(run_id)

    # The end

    def close(self, reason: str) -> None:
        """End every watch with SHUTTING_DOWN, once it has seen all that happened."""
        self._closed = reason
        self._turns.announce()

    async def aclose(self) -> None:
        """Wait for what is still being written, then close the store. Nothing can be written or read afterwards."""
        self.close(self._closed or "the daemon stops")
        while self._writer is not None:
            await self._writer
        await self.read(Store.close)
        self._thread.shutdown(wait=False)


def _write_group(actions: Sequence[Callable[[Store], Any]], store: Store) -> tuple[list[Any], list[Event]]:
    before = store.newest_revision()
    outcomes = store.transact(actions)
    events: list[Event] = []
    while before < store.newest_revision():
        batch, before = store.events_after(before)
        events += batch
    return outcomes, events


def _settle(done: asyncio.Future[Any], outcome: Any) -> None:
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def _crowded(watchers: int) -> OpdError:
    message = (
        f"{watchers} watches are open, as many as this daemon allows: close some, "
        "or start the daemon with a larger --max-watchers"
    )
    return OpdError(Reason.TOO_MANY_WATCHERS, message, watchers=watchers)
