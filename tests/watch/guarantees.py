"""What a watch promises, said once, against a plain list of what was stored."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_daemon.events import Bookmark, EventBatch, WatchItem, WatchStarted
from opd_daemon.types import Event


@dataclass(frozen=True)
class Stored:
    """One event as the model remembers it."""

    run_id: str
    text: str
    batch_end: int


@dataclass
class History:
    """Everything that was stored; the event of revision r is `events[r - 1]`."""

    events: list[Stored] = field(default_factory=list)
    oldest: int = 1

    @property
    def newest(self) -> int:
        return len(self.events)

    def add(self, stored: list[Event]) -> None:
        """A batch with the revisions the store gave it."""
        assert [event.revision for event in stored] == list(range(self.newest + 1, self.newest + len(stored) + 1))
        end = stored[-1].revision
        self.events += [Stored(event.run_id, event.payload["text"], end) for event in stored]

    def between(self, after: int, last: int, run_id: str | None) -> list[int]:
        """Revisions a watch with this filter is owed when its cursor moves from `after` to `last`."""
        start = max(after, self.oldest - 1)
        return [r for r in range(start + 1, last + 1) if run_id in (None, self.events[r - 1].run_id)]


@dataclass
class Reader:
    """What one watcher was told, over all its connections; `cursor` is where it would resume."""

    run_id: str | None
    cursor: int
    seen: list[int] = field(default_factory=list)
    bookmarks: int = 0
    resumed: int = 0

    def told(self, item: WatchItem, history: History, oldest: int) -> None:
        """Check one item; `oldest` is the oldest revision that was kept when the item was asked for."""
        if isinstance(item, WatchStarted):
            assert item.revision <= history.newest
        elif isinstance(item, Bookmark):
            self.bookmarkable(item, history)
            self.cursor = item.revision
        else:
            assert isinstance(item, EventBatch)
            revisions = [event.revision for event in item.events]
            self.ordered(revisions)
            self.unique(revisions)
            self.atomic(revisions, history)
            self.reliable(item, history, oldest)
            self.seen += revisions
            self.cursor = item.revision

    def ordered(self, revisions: list[int]) -> None:
        """Ordered: revisions rise, within a batch and from batch to batch."""
        assert revisions == sorted(revisions)
        assert revisions[0] > self.cursor

    def unique(self, revisions: list[int]) -> None:
        """Unique: nothing comes twice, also not after a resumption."""
        assert len(set(revisions)) == len(revisions)
        assert not set(revisions) & set(self.seen)

    def atomic(self, revisions: list[int], history: History) -> None:
        """Atomic: what was stored together comes in one batch."""
        ends = {history.events[revision - 1].batch_end for revision in revisions}
        for end in ends:
            whole = [
                revision
                for revision in range(revisions[0], end + 1)
                if history.events[revision - 1].batch_end == end
                and self.run_id in (None, history.events[revision - 1].run_id)
            ]
            assert set(whole) <= set(revisions)
        first = history.events[revisions[0] - 1].batch_end
        before = revisions[0] - 1
        if before and history.events[before - 1].batch_end == first:  # a batch of several runs, or nothing before it
            assert self.run_id is not None

    def reliable(self, item: EventBatch, history: History, oldest: int) -> None:
        """Reliable: exactly what happened between two cursors, with its contents; never a silent gap."""
        assert self.cursor + 1 >= oldest
        assert [event.revision for event in item.events] == history.between(self.cursor, item.revision, self.run_id)
        for event in item.events:
            stored = history.events[event.revision - 1]
            assert (event.run_id, event.payload["text"]) == (stored.run_id, stored.text)

    def resumable(self, item: WatchItem, store_id: str, history: History) -> None:
        """Resumable: at every cursor that was ever handed out and is still kept, in the same log."""
        assert isinstance(item, WatchStarted)
        assert (item.store_id, item.oldest_revision) == (store_id, history.oldest)
        assert self.cursor <= item.revision
        self.cursor = max(self.cursor, history.oldest - 1)  # 0 stands for the oldest that is kept
        self.resumed += 1

    def bookmarkable(self, item: Bookmark, history: History) -> None:
        """Bookmarkable: a bookmark passes over nothing this watch is owed, and is a cursor like any other."""
        assert self.cursor <= item.revision <= history.newest
        assert history.between(self.cursor, item.revision, self.run_id) == []
        self.bookmarks += 1
