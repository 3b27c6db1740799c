"""How long the log is kept: old events are forgotten, by age and by size, while the daemon runs."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from opd_daemon.errors import OpdError
from opd_daemon.events import EventLog

log = logging.getLogger(__name__)

PERIOD_SECONDS = 600.0
# Of an event's row, besides its payload: the other columns, and its place in the index.
ROW_BYTES = 150


@dataclass(frozen=True, slots=True)
class Retention:
    """Events younger than `days` are kept; where all of them take more than `max_bytes`, only the newest."""

    days: int = 30
    max_bytes: int = 256 << 20

    def first_kept(self, path: Path, now: datetime) -> int:
        """The revision from which on the events of the store at `path` are kept; reads it beside its owner.

        The log is cut at one place, so an event is kept as long as an older one is: also where the clock jumped.
        """
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return max(self._first_young(database, now), self._first_within(database))

    def _first_young(self, database: sqlite3.Connection, now: datetime) -> int:
        oldest = (now - timedelta(days=self.days)).astimezone(UTC).isoformat(timespec="microseconds")
        young = "SELECT revision FROM events WHERE time >= ? ORDER BY revision LIMIT 1"
        row = database.execute(young, (oldest,)).fetchone()
        return int(row[0]) if row else _after_all(database)

    def _first_within(self, database: sqlite3.Connection) -> int:
        pages, unused, page_bytes = (
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - unused) * page_bytes <= self.max_bytes:  # all is less than the events may be
            return 0
        sizes = (
            f"SELECT revision, SUM(LENGTH(payload) + {ROW_BYTES}) OVER (ORDER BY revision DESC) AS total FROM events"  # noqa: S608
        )
        row = database.execute(f"SELECT MAX(revision) FROM ({sizes}) WHERE total > ?", (self.max_bytes,)).fetchone()  # noqa: S608
        return 0 if row[0] is None else int(row[0]) + 1


async def retain(events: EventLog, path: Path, retention: Retention, *, period: float = PERIOD_SECONDS) -> None:
    """Forget what is not kept, now and then every `period` seconds, until cancelled."""
    while True:
        try:
            await events.compact(await asyncio.to_thread(retention.first_kept, path, datetime.now(UTC)))
        except (OpdError, sqlite3.Error):
            log.exception("old events were not forgotten; the next try is in %.0f s", period)
        await asyncio.sleep(period)


def _after_all(database: sqlite3.Connection) -> int:
    newest = database.execute("SELECT MAX(revision) FROM events").fetchone()[0]
    return int(newest or 0) + 1
