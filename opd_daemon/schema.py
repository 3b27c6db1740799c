"""The store's schema: an ordered list of migrations. A new store goes through all, an older one through the rest.

A migration that has been released is never changed; what must be different is done by a new one at the end.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Migration:
    """A step to the next version: its SQL, done whole or not at all."""

    script: str
    # VACUUM can't run inside a transaction; it is whole by itself, and repeating it does no harm.
    in_transaction: bool = True


MIGRATIONS = (
    Migration(resources.files("opd_daemon").joinpath("store.sql").read_text(encoding="utf-8")),
    # So that the file shrinks, a few pages at a time, when events are forgotten.
    Migration("PRAGMA auto_vacuum = INCREMENTAL; VACUUM;", in_transaction=False),
)
VERSION = len(MIGRATIONS)


def version_of(database: sqlite3.Connection) -> int:
    """The version a database was left at; 0 when it is empty."""
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def migrate(database: sqlite3.Connection) -> None:
    """Bring a database to `VERSION`; one that stops half-way goes on from there the next time."""
    for number in range(version_of(database), VERSION):
        step, mark = MIGRATIONS[number], f"PRAGMA user_version = {number + 1};"
        if step.in_transaction:
            database.executescript(f"BEGIN IMMEDIATE; {step.script} {mark} COMMIT;")
        else:
            database.executescript(f"{step.script} {mark}")
