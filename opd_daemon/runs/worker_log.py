"""What a worker prints, in a file that can't grow without end."""

from __future__ import annotations

import os
from pathlib import Path

LIMIT_BYTES = 8 << 20
KEPT_BYTES = 256 << 10
LINE_BYTES = 4096
CUT = b"... the lines above were cut off to keep this file small ...\n"


class WorkerLog:
    """A file that a worker appends to itself, so that nothing it says on its last breath is lost.

    The worker writes without asking; `trim`, called now and then, drops all but the end of a file that grew too long.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Appending is what lets the file be cut while another process writes to it.
        self._file = path.open("ab", buffering=0)
        self._start = os.fstat(self.fileno()).st_size

    def fileno(self) -> int:
        """The descriptor for the worker's output."""
        return self._file.fileno()

    @property
    def is_long(self) -> bool:
        """Whether the file is over its limit."""
        return os.fstat(self.fileno()).st_size > LIMIT_BYTES

    def trim(self) -> None:
        """Keep the last part only when the file is over its limit."""
        if self.is_long:
            tail = self._tail(KEPT_BYTES)
            self._file.truncate(0)
            self._file.write(CUT + tail)
            self._start = 0

    def last_line(self) -> str:
        """The last line that says something; empty when there is none."""
        lines = self._tail(LINE_BYTES).decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def last_words(self) -> str:
        """The last few lines since this log was opened."""
        said = os.fstat(self.fileno()).st_size - self._start
        return self._tail(min(said, LINE_BYTES)).decode(errors="replace") if said > 0 else ""

    def close(self) -> None:
        """Close the daemon's end."""
        self._file.close()

    def _tail(self, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - size, 0))
            return file.read(size)
