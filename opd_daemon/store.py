"""The daemon's memory: runs, the event log, metrics and checkpoints in one SQLite file.

A `Store` is synchronous and belongs to one thread at a time; `events.EventLog` is its asynchronous owner. A change of
a run and the events that tell of it are written in one transaction, flushed to the disk before it counts as done.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from opd_daemon import schema
from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit
from opd_daemon.store_faults import damaged, disk_error, of_the_disk, unusable
from opd_daemon.store_rows import document_of, read_event, read_run, time_text
from opd_daemon.types import Checkpoint, Event, EventKind, Run, RunState

T = TypeVar("T")

MEASURED = (EventKind.METRICS, EventKind.EVALUATION)
# A page of events: so many, or as many as have so many bytes together, which is far from what gRPC clients take.
PAGE, PAGE_BYTES = 256, 1 << 20
PAGES_AT_ONCE = 256
JOURNAL_BYTES = 64 << 20
DELETED = "deleted:"


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run with the revision at which it was accepted."""

    run: Run
    revision: int


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """The process that works on a run; `started` is its creation time, so that a reused pid is not taken for it."""

    run_id: str
    pid: int
    started: float


class Store:
    """One open database. Reads may be called at any time; writes only inside `transact` or through `apply`."""

    def __init__(self, path: Path) -> None:
        """Open or create the database at `path`.

        Raises:
            OpdError: STORE_UNUSABLE when the file is no store, is damaged, or was written by a newer version.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as fault:
            raise unusable(path, fault) from None
        try:
            self._prepare()
            self.store_id = str(self._value("SELECT value FROM facts WHERE name = 'store_id'"))
        except sqlite3.Error as fault:
            self._database.close()
            raise unusable(path, fault) from None
        except OpdError:
            self._database.close()
            raise
        self._file = _identity(path)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def ask(self, query: Callable[[Store], T]) -> T:
        """Ask something. A fault of the disk is raised as OpdError: STORE_UNUSABLE, DISK_FULL or INTERNAL."""
        try:
            return query(self)
        except sqlite3.Error as fault:
            raise disk_error(fault) from fault

    # Transactions

    def transact(self, actions: Sequence[Callable[[Store], T]]) -> list[T | Exception]:
        """Do several independent actions in one durable transaction; one that raises is undone alone.

        Returns each action's result or exception. A failure of the disk undoes all of them and is raised as OpdError.
        """
        try:
            with self._transaction():
                return [self._attempt(action) for action in actions]
        except (OSError, sqlite3.Error) as fault:
            raise disk_error(fault) from fault

    def apply(self, run: Run | None, events: Sequence[Event]) -> list[Event]:
        """Write a run's new state and its events in one transaction; returns the events with their revisions."""
        action: Callable[[Store], list[Event]] = lambda store: store.write(run, events)  # noqa: E731
        [outcome] = self.transact([action])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def write(self, run: Run | None, events: Sequence[Event]) -> list[Event]:
        """The action of `apply`, for use inside a transaction."""
        stored = self.append(events)
        hit("store.state")
        if run is not None:
            self.update_run(run)
        return stored

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._require_file()
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            hit("store.commit.before")
            hit("disk.write")
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        hit("store.commit.after")

    def _require_file(self) -> None:
        # SQLite would go on writing to a file that has no name any more, and all of it would be lost.
        if _identity(self.path) != self._file:
            message = "the daemon's store was moved or deleted while it ran; put it back or restart the daemon"
            raise OpdError(Reason.STORE_UNUSABLE, message)

    def _attempt(self, action: Callable[[Store], T]) -> T | Exception:
        self._database.execute("SAVEPOINT action")
        try:
            result: T | Exception = action(self)
        except Exception as fault:
            if of_the_disk(fault):
                raise
            # Anything else belongs to the caller of this one action.
            self._database.execute("ROLLBACK TO action")
            result = fault
        self._database.execute("RELEASE action")
        return result

    # Events

    def append(self, events: Sequence[Event]) -> list[Event]:
        """Number events and add them to the log; also keeps metrics and checkpoints by step."""
        first = self.newest_revision() + 1
        stored = [replace(event, revision=first + index) for index, event in enumerate(events)]
        for event in stored:
            self._insert_event(event, stored[-1].revision)
        return stored

    def _insert_event(self, event: Event, batch_end: int) -> None:
        time, payload = time_text(event.time), json.dumps(event.payload)
        row = (event.revision, batch_end, event.run_id, event.kind, time, payload)
        self._database.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", row)
        if event.kind in MEASURED:
            measured = (event.run_id, event.kind, event.payload["step"], event.revision, time, payload)
            self._database.execute("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)", measured)
        elif event.kind is EventKind.CHECKPOINT:
            self._put_checkpoint(event)

    def _put_checkpoint(self, event: Event) -> None:
        entry = event.payload
        if entry.get("is_best"):
            self._database.execute("UPDATE checkpoints SET is_best = 0 WHERE run_id = ?", (event.run_id,))
        best, final = bool(entry.get("is_best")), bool(entry.get("is_final"))
        size, kl = entry.get("bytes", 0), entry.get("validation_kl")
        row = (event.run_id, entry["path"], entry["step"], time_text(event.time), size, best, final, kl)
        self._database.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def newest_revision(self) -> int:
        """Revision of the newest event ever stored; 0 in a new store."""
        newest = self._value("SELECT MAX(revision) FROM events")
        return int(newest if newest is not None else self._compacted())

    def oldest_revision(self) -> int:
        """The oldest revision still kept; one more than the newest when none is."""
        oldest = self._value("SELECT MIN(revision) FROM events")
        return int(oldest if oldest is not None else self._compacted() + 1)

    def events_after(self, revision: int, run_id: str | None = None, limit: int = PAGE) -> tuple[list[Event], int]:
        """Events after a cursor, oldest first, and the cursor after them.

        Fewer than `limit` where they are large. Events that were stored together are never split, so a little more
        than `limit` may come.
        """
        newest = self.newest_revision()
        where, values = ("run_id = ? AND ", (run_id,)) if run_id else ("", ())
        select = f"SELECT revision, run_id, kind, time, payload, batch_end FROM events WHERE {where}"  # noqa: S608
        found = self._database.execute(f"{select} revision > ? ORDER BY revision LIMIT ?", (*values, revision, limit))
        rows, size = [], 0
        while size < PAGE_BYTES and (row := found.fetchone()):
            rows.append(row)
            size += len(row[4])
        if size < PAGE_BYTES and len(rows) < limit:
            return [read_event(row) for row in rows], max(newest, revision)
        last, batch_end = rows[-1][0], rows[-1][5]
        rows += self._rows(f"{select} revision > ? AND revision <= ? ORDER BY revision", (*values, last, batch_end))
        return [read_event(row) for row in rows], batch_end

    def compact(self, before_revision: int) -> int:
        """Forget events before a revision, not metrics and checkpoints; returns the oldest revision kept.

        Events that were stored together stay together.
        """
        query = "SELECT revision FROM events WHERE revision < ? AND batch_end < ? ORDER BY revision DESC LIMIT 1"
        last = self._value(query, (before_revision, before_revision))
        if last is not None:
            with self._transaction():
                self._database.execute("DELETE FROM events WHERE revision <= ?", (last,))
                hit("store.compact")
                self._database.execute("INSERT OR REPLACE INTO facts VALUES ('compacted', ?)", (str(last),))
        return self.oldest_revision()

    def shrink(self) -> bool:
        """Give a few unused pages back to the file system; whether there are more."""
        before = self._value("PRAGMA freelist_count")
        # Not `execute`, which would free a single page: SQLite frees one at each step of the statement.
        self._database.executescript(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})")
        return 0 < int(self._value("PRAGMA freelist_count")) < int(before)

    def _compacted(self) -> int:
        return int(self._value("SELECT value FROM facts WHERE name = 'compacted'") or 0)

    # Runs

    def insert_run(self, run: Run, events: Sequence[Event], request_digest: str) -> StoredRun:
        """Add a new run with the events that announce it; inside a transaction."""
        # The files of this name are the new run's from here on, on a disk that takes its other spellings for it too.
        self._database.execute("DELETE FROM facts WHERE name = ? COLLATE NOCASE", (DELETED + run.run_id,))
        revision = self.append(events)[-1].revision
        row = (run.run_id, revision, run.state, run.request_id, request_digest, document_of(run))
        self._database.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", row)
        return StoredRun(run, revision)

    def update_run(self, run: Run) -> None:
        """Replace a run's row; inside a transaction.

        Raises:
            OpdError: RUN_NOT_FOUND.
        """
        row = (run.state, document_of(run), run.run_id)
        changed = self._database.execute("UPDATE runs SET state = ?, document = ? WHERE run_id = ?", row)
        if changed.rowcount == 0:
            raise run_not_found(run.run_id)

    def get_run(self, run_id: str) -> Run:
        """The run.

        Raises:
            OpdError: RUN_NOT_FOUND.
        """
        rows = self._rows("SELECT document FROM runs WHERE run_id = ?", (run_id,))
        if not rows:
            raise run_not_found(run_id)
        return read_run(rows[0][0])

    def has_run(self, run_id: str) -> bool:
        """Whether the store knows this run."""
        return bool(self._rows("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)))

    def accepted_at(self, run_id: str) -> int | None:
        """A revision before every event of the run, or before the oldest one kept; None for a run it doesn't know."""
        accepted = self._value("SELECT revision FROM runs WHERE run_id = ?", (run_id,))
        return None if accepted is None else max(int(accepted), self.oldest_revision()) - 1

    def run_ids(self) -> set[str]:
        """Names of all runs."""
        return {row[0] for row in self._rows("SELECT run_id FROM runs")}

    def run_by_request_id(self, request_id: str, digest: str) -> StoredRun | None:
        """The run an earlier request with this id created.

        Raises:
            OpdError: REQUEST_ID_REUSED when that request had another body.
        """
        if not request_id:
            return None
        query = "SELECT document, revision, request_digest FROM runs WHERE request_id = ?"
        rows = self._rows(query, (request_id,))
        if not rows:
            return None
        run = read_run(rows[0][0])
        if rows[0][2] != digest:
            message = (
                f"request_id {request_id!r} was used before, for run {run.run_id!r}; use a new id for a new request"
            )
            raise OpdError(Reason.REQUEST_ID_REUSED, message, request_id=request_id, run_id=run.run_id)
        return StoredRun(run, rows[0][1])

    def list_runs(
        self,
        states: Collection[RunState] = (),
        *,
        limit: int = PAGE,
        before: int | None = None,
        oldest_first: bool = False,
    ) -> list[StoredRun]:
        """Runs by creation, newest first unless asked otherwise; `before` leaves those created before a revision."""
        marks = ", ".join("?" * len(states))
        conditions = [f"state IN ({marks})"] if states else []
        conditions += ["revision < ?"] if before is not None else []
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        order = "ASC" if oldest_first else "DESC"
        query = f"SELECT document, revision FROM runs {where} ORDER BY revision {order} LIMIT ?"  # noqa: S608
        values = [*states, *([before] if before is not None else []), limit]
        return [StoredRun(read_run(document), revision) for document, revision in self._rows(query, values)]

    def count_runs(self) -> dict[RunState, int]:
        """How many runs there are in each state; states without any are left out."""
        rows = self._rows("SELECT state, COUNT(*) FROM runs GROUP BY state")
        return {RunState(state): count for state, count in rows}

    def delete_run(self, run_id: str) -> None:
        """Forget a run, its metrics and checkpoints; inside a transaction. Its events stay: the log has no gaps.

        It is among the `deleted_runs` until `forget_deleted`, so that its files go even after a crash.
        """
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, '')", (DELETED + run_id,))
        for table in ("runs", "metrics", "checkpoints", "workers"):
            self._database.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))  # noqa: S608

    def deleted_runs(self) -> list[str]:
        """Deleted runs whose files may still be there."""
        rows = self._rows("SELECT name FROM facts WHERE name LIKE ?", (f"{DELETED}%",))
        return [row[0].removeprefix(DELETED) for row in rows]

    def forget_deleted(self, run_id: str) -> None:
        """The files of a deleted run are gone; inside a transaction."""
        self._database.execute("DELETE FROM facts WHERE name = ?", (DELETED + run_id,))

    def rewind(self, run_id: str, step: int) -> None:
        """Forget metrics and checkpoints after `step`: a resumed run makes them again; inside a transaction."""
        for table in ("metrics", "checkpoints"):
            self._database.execute(f"DELETE FROM {table} WHERE run_id = ? AND step > ?", (run_id, step))  # noqa: S608
        hit("store.rewind")

    # What belongs to a run

    def metrics(
        self, run_id: str, kind: EventKind, *, after_step: int = -1, limit: int = 1000, stride: int = 1
    ) -> list[Event]:
        """METRICS or EVALUATION events by step: every `stride`-th, and the first and the last always."""
        query = (
            "SELECT revision, run_id, kind, time, payload FROM metrics WHERE run_id = :run AND kind = :kind "
            "AND step > :after AND (step % :stride = 0 "
            "OR step = (SELECT MIN(step) FROM metrics WHERE run_id = :run AND kind = :kind) "
            "OR step = (SELECT MAX(step) FROM metrics WHERE run_id = :run AND kind = :kind)) ORDER BY step LIMIT :limit"
        )
        values = {"run": run_id, "kind": kind, "after": after_step, "stride": max(stride, 1), "limit": limit}
        return [read_event(row) for row in self._database.execute(query, values).fetchall()]

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Checkpoints the run reported, oldest first; some may have been tidied away since."""
        query = (
            "SELECT step, path, created_at, bytes, is_best, is_final, validation_kl FROM checkpoints "
            "WHERE run_id = ? ORDER BY step, created_at"
        )
        return [
            Checkpoint(step, path, datetime.fromisoformat(created), size, bool(best), bool(final), kl)
            for step, path, created, size, best, final, kl in self._rows(query, (run_id,))
        ]

    def put_worker(self, worker: WorkerRecord) -> None:
        """Remember the process that works on a run; inside a transaction."""
        row = (worker.run_id, worker.pid, worker.started)
        self._database.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?)", row)

    def forget_worker(self, run_id: str) -> None:
        """The run's worker is gone; inside a transaction."""
        self._database.execute("DELETE FROM workers WHERE run_id = ?", (run_id,))

    def workers(self) -> list[WorkerRecord]:
        """Workers that were not seen to end."""
        return [WorkerRecord(*row) for row in self._rows("SELECT run_id, pid, started FROM workers")]

    # The file

    def _prepare(self) -> None:
        version = schema.version_of(self._database)
        if version > schema.VERSION:
            message = (
                f"{self.path}: written by a newer opd (schema {version}, this one knows {schema.VERSION}); upgrade opd"
            )
            raise OpdError(Reason.STORE_UNUSABLE, message, path=self.path, schema=version)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        # A large transaction, as of a migration, must not leave a large file behind.
        self._database.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
        if sys.platform == "darwin":  # there, fsync alone leaves data in the drive's own cache
            self._database.execute("PRAGMA fullfsync = 1")
        # A damaged page is found now, a third of a second for 100 MB, and not in the middle of a run.
        verdict = self._value("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise damaged(self.path, " ".join(str(verdict).split()))
        schema.migrate(self._database)

    def _rows(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        return self._database.execute(query, tuple(values)).fetchall()

    def _value(self, query: str, values: Iterable[Any] = ()) -> Any:
        rows = self._rows(query, values)
        return rows[0][0] if rows else None


def run_not_found(run_id: str) -> OpdError:
    """The error for an unknown run."""
    return OpdError(Reason.RUN_NOT_FOUND, f"no run {run_id!r}; 'opd runs' lists them", run_id=run_id)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at a path; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
