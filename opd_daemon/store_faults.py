"""What can be wrong with the store's file, in words with a cure."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from opd_daemon.errors import OpdError, Reason

DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def of_the_disk(fault: Exception) -> bool:
    """Whether a fault is the file's or the disk's, and not that of one statement."""
    return isinstance(fault, sqlite3.OperationalError) or (isinstance(fault, sqlite3.Error) and _code(fault) in DAMAGE)


def damaged(path: Path, what: str) -> OpdError:
    """The error for a file whose contents can't be trusted."""
    cure = "put a copy made with 'opd store backup' in its place, or move it away and the daemon starts a new one"
    return OpdError(Reason.STORE_UNUSABLE, f"{path}: damaged, or no store ({what}); {cure}", path=path)


def unusable(path: Path, fault: OSError | sqlite3.Error) -> OpdError:
    """The error for a file that can't be opened, or can't be trusted."""
    if _no_space(fault):
        return _disk_full()
    code = _code(fault)
    if code in DAMAGE:
        return damaged(path, str(fault))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        message = f"{path}: another program holds it ({fault}); close that and try again"
        return OpdError(Reason.STORE_UNUSABLE, message, path=path)
    message = f"{path}: can't be opened ({fault}); check that it is a file which this user may read and write"
    return OpdError(Reason.STORE_UNUSABLE, message, path=path)


def disk_error(fault: OSError | sqlite3.Error) -> OpdError:
    """The error for an open store that can't be read or written any more: DISK_FULL, STORE_UNUSABLE or INTERNAL."""
    if _no_space(fault):
        return _disk_full()
    if _code(fault) in DAMAGE:
        message = "the daemon's store is damaged; stop the daemon, and 'opd store check' tells what is wrong"
        return OpdError(Reason.STORE_UNUSABLE, message)
    return OpdError(Reason.INTERNAL, f"the daemon's store can't be used: {fault}")


def _disk_full() -> OpdError:
    return OpdError(Reason.DISK_FULL, "no space left on the daemon's disk; free some and try again")


def _no_space(fault: OSError | sqlite3.Error) -> bool:
    return _code(fault) == sqlite3.SQLITE_FULL or getattr(fault, "errno", None) == errno.ENOSPC


def _code(fault: OSError | sqlite3.Error) -> int:
    """The primary result code of SQLite; 0 where the fault is not SQLite's own."""
    return getattr(fault, "sqlite_errorcode", 0) & 0xFF
