"""Files of prompts that clients without a disk in common with the daemon have sent, kept under their content."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from opd_daemon.distill.files import FULL, sync_folder
from opd_daemon.errors import OpdError, Reason, invalid

PIECE_BYTES = 1 << 20
MOST_BYTES = 256 << 20
MOST_BYTES_OF_ALL = 4 << 30
AT_A_TIME = 4
MOST_SECONDS, MOST_SILENCE = 900.0, 30.0
PARTIAL = ".part"


@dataclass(frozen=True, slots=True)
class UploadPiece:
    """Some bytes, in order. sha256: of the whole file, in hex; empty where the client doesn't say."""

    data: bytes
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that was kept."""

    path: Path
    sha256: str
    bytes: int


class Uploads:
    """The folder of uploads. Half of a file is never kept, and never has a name of its own."""

    def __init__(
        self, folder: Path, *, most_bytes: int = MOST_BYTES, most_bytes_of_all: int = MOST_BYTES_OF_ALL
    ) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._most_bytes_of_all = most_bytes_of_all
        self._turn = asyncio.Semaphore(AT_A_TIME)
        self._keeping = threading.Lock()

    def remove_partial(self) -> None:
        """Remove what uploads left that a killed daemon did not finish. Only while none is under way; blocks."""
        for path in self._folder.glob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)

    async def receive(self, pieces: AsyncIterator[UploadPiece]) -> Upload:
        """Keep a file that comes in pieces.

        Raises:
            OpdError: INVALID_REQUEST for a file that is empty, too large or not what its digest says; DISK_FULL;
                DEADLINE_EXCEEDED for one that comes too slowly, as others wait for its place.
        """
        async with self._turn:
            with self._partial() as (path, file):
                digest, size = await self._write(file, pieces)
                if size == 0:
                    raise invalid("data", "empty; send a JSONL file with one row a line")
                return await asyncio.to_thread(self._keep, path, digest, size)

    async def _write(self, file: IO[bytes], pieces: AsyncIterator[UploadPiece]) -> tuple[str, int]:
        """Digest and size of all that came."""
        digest, size, expected = hashlib.sha256(), 0, ""
        room = self._most_bytes_of_all - await asyncio.to_thread(self._taken)
        async for piece in _in_time(pieces):
            size += len(piece.data)
            expected = piece.sha256 or expected
            if len(piece.data) > PIECE_BYTES:
                raise invalid("data", f"a piece of {len(piece.data)} bytes; send at most {PIECE_BYTES}")
            if size > self._most_bytes:
                raise invalid("data", f"more than {self._most_bytes} bytes; send the rows that are used")
            if size > room:
                raise self._no_room()
            digest.update(piece.data)
            await asyncio.to_thread(_write_all, file, piece.data)
        if expected and expected != digest.hexdigest():
            raise invalid("sha256", f"{expected!r}, but what came has {digest.hexdigest()}; send the file again")
        await asyncio.to_thread(_sync, file)
        return digest.hexdigest(), size

    @contextlib.contextmanager
    def _partial(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file, removed in the end unless it has been renamed."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{secrets.token_hex(16)}{PARTIAL}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _keep(self, path: Path, digest: str, size: int) -> Upload:
        kept = self._folder / f"{digest}.jsonl"
        with self._keeping:
            # Others that came at the same time may have taken the room there was at the beginning.
            if not kept.exists() and self._taken() > self._most_bytes_of_all:
                raise self._no_room()
            path.replace(kept)
        sync_folder(self._folder)
        return Upload(kept, digest, size)

    def _no_room(self) -> OpdError:
        message = f"all uploads together would take more than {self._most_bytes_of_all} bytes"
        cure = "delete some from the folder 'uploads' in the daemon's home"
        return OpdError(Reason.DISK_FULL, f"{message}; {cure}", limit_bytes=self._most_bytes_of_all)

    def _taken(self) -> int:
        with os.scandir(self._folder) as entries:
            return sum(map(_size, entries))


async def _in_time(pieces: AsyncIterator[UploadPiece]) -> AsyncIterator[UploadPiece]:
    end = time.monotonic() + MOST_SECONDS
    while True:
        seconds = min(MOST_SILENCE, end - time.monotonic())
        try:
            # Not in a task of its own, which would take a stream that broke off for one that ended.
            async with asyncio.timeout(seconds):
                piece = await anext(pieces, None)
        except TimeoutError:
            message = (
                f"nothing came for {MOST_SILENCE:.0f} s, or not all within {MOST_SECONDS:.0f}; send the file again"
            )
            raise OpdError(Reason.DEADLINE_EXCEEDED, message) from None
        if piece is None:
            return
        yield piece


def _size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file; 0 for one that is gone since, as that of an upload which has just been given up."""
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _write_all(file: IO[bytes], data: bytes) -> None:
    with _told():
        file.write(data)


def _sync(file: IO[bytes]) -> None:
    with _told():
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        if fault.errno in FULL:
            raise OpdError(Reason.DISK_FULL, "no space left on the daemon's disk; free some and send again") from None
        raise
