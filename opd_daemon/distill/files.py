"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_file(path: Path, content: bytes) -> None:
    """Write a file through a temporary name.

    Raises:
        OpdError: DISK_FULL, or INVALID_REQUEST where the folder can't be written to; no half file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hit("disk.write")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hit("disk.rename")
        temporary.replace(path)
    except OSError as fault:
        with suppress(OSError):
            temporary.unlink()
        raise write_error(path, fault) from fault


def append_line(path: Path, line: str) -> None:
    """Append one line to a log that is read while it grows. Raises as `write_file` does."""
    try:
        hit("disk.write")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as fault:
        raise write_error(path, fault) from fault


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a whole folder under a temporary name, then put it in the place of `path`.

    Raises:
        OpdError: DISK_FULL, or INVALID_REQUEST where the folder can't be written to; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.old")
    try:
        hit("disk.write")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        sync_folder(temporary)
        hit("folder.filled")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
            hit("folder.moved")
        temporary.rename(path)
        sync_folder(path.parent)
        hit("folder.placed")
        shutil.rmtree(old, ignore_errors=True)
    except OSError as fault:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_error(path, fault) from fault
    except OpdError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that nobody ever sees a part of it: what a death leaves has a hidden name.

    Raises:
        OSError: it can't be taken away; it is as it was.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    hit("folder.hidden")
    shutil.rmtree(hidden, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Make what was appended to a log durable; nothing to do where there is none yet. Raises as `write_file` does."""
    try:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    except FileNotFoundError:
        return
    except OSError as fault:
        raise write_error(path, fault) from fault


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, fault: OSError) -> OpdError:
    """The error a person should see for a failed write."""
    if fault.errno in FULL:
        message = f"{path}: no space left on the disk; free some and resume the run"
        return OpdError(Reason.DISK_FULL, message, path=path)
    return OpdError(Reason.INVALID_REQUEST, f"{path}: can't be written: {fault.strerror}", path=path)
