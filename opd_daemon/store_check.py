"""Whether a store keeps its own promises: what SQLite can't know of what is in its pages."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from opd_daemon import schema
from opd_daemon.store_faults import damaged, unusable

MOST_FAULTS = 20


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a check found. Without faults the store can be trusted."""

    store_id: str
    schema: int
    bytes: int
    events: int
    oldest_revision: int
    newest_revision: int
    runs: int
    faults: tuple[str, ...]


def check_store(path: Path) -> StoreReport:
    """Read all of a store, beside the daemon if one runs; nothing is changed.

    Raises:
        OpdError: STORE_UNUSABLE when the file is no store, or is damaged: SQLite's own findings.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.execute("BEGIN")  # everything is read as of one moment
            return _report(path, database)
    except sqlite3.Error as fault:
        raise unusable(path, fault) from None


def _report(path: Path, database: sqlite3.Connection) -> StoreReport:
    damage = [" ".join(row[0].split()) for row in database.execute(f"PRAGMA integrity_check({MOST_FAULTS})")]
    if damage != ["ok"]:  # in damaged pages our own promises can't be looked for
        raise damaged(path, "; ".join(damage))
    facts = dict(database.execute("SELECT name, value FROM facts").fetchall())
    events, oldest, newest = database.execute("SELECT COUNT(*), MIN(revision), MAX(revision) FROM events").fetchone()
    pages, page_bytes = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    compacted = int(facts.get("compacted", 0))
    return StoreReport(
        store_id=facts["store_id"],
        schema=schema.version_of(database),
        bytes=pages * page_bytes,
        events=events,
        oldest_revision=compacted + 1 if oldest is None else oldest,
        newest_revision=compacted if newest is None else newest,
        runs=database.execute("SELECT COUNT(*) FROM runs").fetchone()[0],
        faults=tuple(fault for look in _LOOKS for fault in _some(look(database))),
    )


def _some(faults: Iterator[str]) -> Iterator[str]:
    for number, fault in enumerate(faults):
        if number == MOST_FAULTS:
            yield "and more of the same"
            return
        yield fault


def _revisions(database: sqlite3.Connection) -> Iterator[str]:
    """Revisions begin after the last one that was compacted, and rise by one."""
    row = database.execute("SELECT value FROM facts WHERE name = 'compacted'").fetchone()
    before = int(row[0]) if row else 0
    for (revision,) in database.execute("SELECT revision FROM events ORDER BY revision"):
        if revision != before + 1:
            yield f"events: after revision {before} comes {revision}"
        before = revision


def _batches(database: sqlite3.Connection) -> Iterator[str]:
    """What was stored together is there from its first to its last event."""
    end = 0
    for revision, batch_end in database.execute("SELECT revision, batch_end FROM events ORDER BY revision"):
        if batch_end < revision or (revision <= end and batch_end != end):
            yield f"events: revision {revision} breaks the batch that ends at {max(end, batch_end)}"
        end = batch_end
    newest = database.execute("SELECT MAX(revision) FROM events").fetchone()[0] or 0
    if end > newest:
        yield f"events: the batch that ends at {end} is cut after {newest}"


def _contents(database: sqlite3.Connection) -> Iterator[str]:
    """Every payload and every run's document is JSON."""
    for table, key, column in (
        ("events", "revision", "payload"),
        ("metrics", "revision", "payload"),
        ("runs", "run_id", "document"),
    ):
        for name, text in database.execute(f"SELECT {key}, {column} FROM {table}"):  # noqa: S608 - our own names
            try:
                json.loads(text)
            except ValueError:
                yield f"{table}: {column} of {name} is not readable"


def _runs(database: sqlite3.Connection) -> Iterator[str]:
    """A run's row says what the last event about its state says, and the log knows when it was accepted."""
    oldest = database.execute("SELECT MIN(revision) FROM events").fetchone()[0]
    accepted = "SELECT run_id FROM events WHERE revision = ?"
    told = "SELECT payload FROM events WHERE run_id = ? AND kind = 'RUN_STATE' ORDER BY revision DESC LIMIT 1"
    for run_id, revision, state, document in database.execute("SELECT run_id, revision, state, document FROM runs"):
        if _value(document, "state") != state:
            yield f"run {run_id}: its row says {state}, its document {_value(document, 'state')}"
        first, last = database.execute(accepted, (revision,)).fetchone(), database.execute(told, (run_id,)).fetchone()
        if oldest is not None and revision >= oldest and first != (run_id,):
            yield f"run {run_id}: revision {revision}, at which it was accepted, is not about it"
        if last is not None and _value(last[0], "state") != state:
            yield f"run {run_id}: its row says {state}, its last event {_value(last[0], 'state')}"


def _checkpoints(database: sqlite3.Connection) -> Iterator[str]:
    """The adapters a run is known for are on the disk; other checkpoints are tidied away as it goes on."""
    kept = "SELECT run_id, step, path FROM checkpoints WHERE is_best OR is_final ORDER BY run_id, step"
    for run_id, step, path in database.execute(kept):
        if not Path(path).is_dir():
            yield f"run {run_id}: the folder of its checkpoint of step {step} is gone: {path}"


_LOOKS = (_revisions, _batches, _contents, _runs, _checkpoints)


def _value(document: str, name: str) -> object:
    try:
        return json.loads(document).get(name)
    except ValueError:
        return None
