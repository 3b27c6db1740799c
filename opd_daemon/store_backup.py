"""A copy of the store, made while the daemon runs."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from opd_daemon.errors import invalid
from opd_daemon.store_faults import unusable


def back_up(path: Path, destination: Path) -> None:
    """Copy the store at `path` to a new file, as it is at one moment; nobody has to wait for it.

    The copy is a store of its own: put in the place of the first, it would give the revisions that are missing in it
    to other events. With another id, whoever watched the first store is told to start again.

    Raises:
        OpdError: INVALID_REQUEST when there is such a file, or no such folder; STORE_UNUSABLE; DISK_FULL.
    """
    if destination.exists():
        raise invalid("DEST", f"{destination} exists; name a file that does not, a copy never overwrites anything")
    if not destination.parent.is_dir():
        raise invalid("DEST", f"{destination.parent} is no folder; create it first")
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        _copy(path, temporary)
        temporary.rename(destination)
    except sqlite3.Error as fault:
        raise unusable(path, fault) from None
    except OSError as fault:
        raise invalid("DEST", f"{destination}: can't be written ({fault.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _copy(path: Path, temporary: Path) -> None:
    with (
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(temporary, isolation_level=None)) as copy,
    ):
        source.backup(copy)  # all pages in one step, hence of one moment
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, complete
        copy.execute("UPDATE facts SET value = lower(hex(randomblob(16))) WHERE name = 'store_id'")
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
