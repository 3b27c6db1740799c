"""Numbers as people read them."""

from __future__ import annotations

import re
from datetime import datetime

from opd_daemon.errors import OpdError, Reason

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)I?B?\s*", re.IGNORECASE)


def size(count: float) -> str:
    """Bytes: `512 B`, `5.2 MB`, `31.4 GB` (powers of ten, as disks and macOS count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_size(text: str, flag: str) -> int:
    """`500MB`, `20 GB` or plain bytes as a number of bytes.

    Raises:
        OpdError: INVALID_REQUEST naming the flag.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise OpdError(Reason.INVALID_REQUEST, f"{flag} {text}: not a size; write it like 500MB or 20GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def duration(seconds: float) -> str:
    """Seconds: `8 s`, `2 min 05 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def percent(fraction: float) -> str:
    """A share: `61.3 %`."""
    return f"{100 * fraction:.1f} %"


def clock(time: datetime) -> str:
    """Local time of day."""
    return time.astimezone().strftime("%H:%M:%S")


def day_and_clock(time: datetime) -> str:
    """Local date and time."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def one_line(text: str, limit: int) -> str:
    """Text without line breaks and other control characters, at most `limit` characters."""
    flat = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
