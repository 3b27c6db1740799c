"""Numbers and long texts as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes: `512 B`, `5.2 MB`, `31.4 GB` (powers of ten, as disks and macOS count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters, and how many more there were."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} characters more)"


def percent(fraction: float) -> str:
    """A share: `61.3 %`."""
    return f"{100 * fraction:.1f} %"
