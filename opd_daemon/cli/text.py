"""Numbers as people read them."""

from __future__ import annotations

import re
from datetime import datetime

from opd_daemon.errors import OpdError, Reason
from opd_daemon.readable import duration, percent, size

__all__ = ["clock", "day_and_clock", "duration", "one_line", "parse_size", "percent", "size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)I?B?\s*", re.IGNORECASE)


def parse_size(text: str, flag: str) -> int:
    """`500MB`, `20 GB` or plain bytes as a number of bytes.

    Raises:
        OpdError: INVALID_REQUEST naming the flag.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise OpdError(Reason.INVALID_REQUEST, f"{flag} {text}: not a size; write it like 500MB or 20GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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
