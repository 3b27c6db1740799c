"""The teacher's answers on disk: addressed by content, checksummed, least recently used first out.

One file an entry, `ab/<address>`: magic, sha256 of the payload, payload (safetensors). Files appear by rename, so a
crash leaves only temporary names, which the next start removes. An entry that fails a check is deleted and counts as
a miss.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from opd_daemon.failpoints import hit
from opd_daemon.types import CacheStats

if TYPE_CHECKING:
    from opd_daemon.teacher.payload import Entry

logger = logging.getLogger(__name__)

MAGIC = b"OPDTEACH"
CHECKSUM_BYTES = 32
HEADER_BYTES = len(MAGIC) + CHECKSUM_BYTES
ADDRESS = re.compile(r"[0-9a-f]{64}")
TEMPORARY = ".tmp"

T = TypeVar("T")


class TeacherCache:
    """Thread-safe. Reading and pruning block on the disk; writing happens on a thread of its own."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        # Entries on their way to the disk, so that what was just computed is found again at once.
        self._unwritten: dict[str, Entry] = {}
        self._stats = CacheStats(limit_bytes=limit_bytes)
        self._writer = ThreadPoolExecutor(1, "teacher-cache")
        self._writable = True

    def open(self) -> None:
        """Index what is on disk, oldest first, and remove what a crash left half written."""
        found = []
        for file in self._folder.glob("*/*"):
            if file.name.endswith(TEMPORARY):
                file.unlink(missing_ok=True)
            elif ADDRESS.fullmatch(file.name):
                stat = file.stat()
                found.append((stat.st_mtime_ns, file.name, stat.st_size))
        with self._lock:
            self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
            self._bytes = sum(self._sizes.values())
        self._evict(self._stats.limit_bytes)

    def close(self) -> None:
        """Finish writing."""
        self._writer.shutdown(wait=True)

    def __contains__(self, address: str) -> bool:
        with self._lock:
            return address in self._sizes or address in self._unwritten

    def size(self, address: str) -> int:
        """Bytes of an entry on disk; 0 for one that isn't there, or not yet."""
        with self._lock:
            return self._sizes.get(address, 0)

    def count_misses(self, count: int) -> None:
        """Count addresses that were looked for and not found in here."""
        self._count(misses=count)

    def read(self, address: str, decode: Callable[[Entry], T]) -> tuple[T, float] | None:
        """The decoded entry with the milliseconds it saves, or None; counts as a hit or a miss.

        `decode` raises ValueError for an entry that isn't what was asked for.
        """
        with self._lock:
            entry = self._unwritten.get(address)
            known = address in self._sizes
        try:
            entry = entry or (self._load(address) if known else None)
            value = decode(entry) if entry else None
        except ValueError as error:
            self._discard_corrupt(address, error)
            value = None
        if entry is None or value is None:
            self._count(misses=1)
            return None
        self._touch(address)
        self._count(hits=1, milliseconds_saved=entry.milliseconds)
        return value, entry.milliseconds

    def write(self, address: str, entry: Entry) -> None:
        """Store an entry soon. A disk that refuses is a warning; the entry is simply not kept."""
        with self._lock:
            self._unwritten[address] = entry
        self._writer.submit(self._store, address, entry)

    def prune(self, max_bytes: int) -> None:
        """Remove least recently used entries until at most `max_bytes` are on disk."""
        # What is still on its way would arrive behind the pruning.
        self._writer.submit(self._evict, max_bytes).result()

    def stats(self) -> CacheStats:
        """Look-ups since the daemon started, and what is on disk."""
        with self._lock:
            return replace(self._stats, entries=len(self._sizes), bytes=self._bytes)

    def _evict(self, max_bytes: int) -> None:
        removed = []
        with self._lock:
            while self._sizes and self._bytes > max_bytes:
                address = next(iter(self._sizes))
                self._forget(address)
                removed.append(address)
        for address in removed:
            self._path(address).unlink(missing_ok=True)
        self._count(evicted=len(removed))

    def _forget(self, address: str) -> None:
        """With the lock held."""
        self._bytes -= self._sizes.pop(address, 0)

    def _path(self, address: str) -> Path:
        return self._folder / address[:2] / address

    def _load(self, address: str) -> Entry | None:
        try:
            content = self._path(address).read_bytes()
        except OSError:
            with self._lock:
                self._forget(address)
            return None
        payload = content[HEADER_BYTES:]
        if content[: len(MAGIC)] != MAGIC:
            raise ValueError("it doesn't start as an entry does")
        if hashlib.sha256(payload).digest() != content[len(MAGIC) : HEADER_BYTES]:
            raise ValueError("its checksum is wrong")
        from opd_daemon.teacher.payload import Entry  # with numpy, which a cache that is only counted does without

        return Entry.decoded(payload)

    def _store(self, address: str, entry: Entry) -> None:
        path = self._path(address)
        temporary = path.with_name(f"{address}.{os.getpid()}{TEMPORARY}")
        payload = entry.encoded()
        try:
            hit("disk.write")
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                stream.write(MAGIC + hashlib.sha256(payload).digest() + payload)
                stream.flush()
                os.fsync(stream.fileno())
            hit("cache.write")
            temporary.replace(path)
            hit("cache.index")
        except OSError as error:
            self._warn_unwritable(error)
            _remove_quietly(temporary)
            with self._lock:
                self._unwritten.pop(address, None)
            return
        self._writable = True
        with self._lock:
            self._forget(address)
            self._sizes[address] = HEADER_BYTES + len(payload)
            self._bytes += self._sizes[address]
            self._unwritten.pop(address, None)
        self._evict(self._stats.limit_bytes)

    def _touch(self, address: str) -> None:
        with self._lock:
            if address not in self._sizes:
                return
            self._sizes.move_to_end(address)
        try:
            os.utime(self._path(address))
        except OSError:
            logger.debug("teacher cache: %s could not be touched", address)

    def _discard_corrupt(self, address: str, error: Exception) -> None:
        logger.warning("teacher cache: entry %s is corrupt (%s); deleted, it will be computed again", address, error)
        with self._lock:
            self._forget(address)
            self._unwritten.pop(address, None)
        self._path(address).unlink(missing_ok=True)
        self._count(corrupt=1)

    def _warn_unwritable(self, error: OSError) -> None:
        if self._writable:
            logger.warning("teacher cache: cannot write (%s); results are not kept until it can", error.strerror)
        self._writable = False

    def _count(
        self, *, hits: int = 0, misses: int = 0, corrupt: int = 0, evicted: int = 0, milliseconds_saved: float = 0.0
    ) -> None:
        with self._lock:
            now = self._stats
            self._stats = replace(
                now,
                hits=now.hits + hits,
                misses=now.misses + misses,
                corrupt=now.corrupt + corrupt,
                evicted=now.evicted + evicted,
                milliseconds_saved=now.milliseconds_saved + milliseconds_saved,
            )


def _remove_quietly(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        logger.debug("teacher cache: %s could not be removed", file.name)
