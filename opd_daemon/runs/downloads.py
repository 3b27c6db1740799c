"""Files that are sent to a client: opened together, they are of one version, whatever becomes of their names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

# A folder that is replaced has no name for a moment, and its old files go soon afterwards.
TRIES, PAUSE_SECONDS = 5, 0.05


def open_files(paths: Iterable[Path]) -> list[BinaryIO]:
    """Open all of them, or none. Raises OSError."""
    with ExitStack() as opened:
        files: list[BinaryIO] = [opened.enter_context(path.open("rb")) for path in paths]
        opened.pop_all()
        return files


def open_folder(folder: Path, find: Callable[[Path], list[Path]]) -> list[BinaryIO]:
    """Open what `find` finds in a folder that may be replaced at any time; it blocks, and tries a few times.

    Raises:
        FileNotFoundError: there is no such folder, or it is replaced again and again.
    """
    for _ in range(TRIES - 1):
        try:
            return _open_now(folder, find)
        except FileNotFoundError:
            time.sleep(PAUSE_SECONDS)
    return _open_now(folder, find)


def _open_now(folder: Path, find: Callable[[Path], list[Path]]) -> list[BinaryIO]:
    # Held open, so that no other folder can get its inode.
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files = open_files(find(folder))
        if not _leads_to(folder, held):
            for file in files:
                file.close()
            raise FileNotFoundError(f"{folder}: replaced while its files were opened")
        return files
    finally:
        os.close(held)


def _leads_to(folder: Path, held: int) -> bool:
    """Whether a path still leads to the folder that is held open."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(held))
    except FileNotFoundError:
        return False
