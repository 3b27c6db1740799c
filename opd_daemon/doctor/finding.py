"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is: an error keeps opd from working, a warning makes it slow or fragile."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found and, unless all is well, what to do about it."""

    subject: str
    level: Level
    text: str
    cure: str = ""


def fine(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(subject, Level.OK, text)


def warning(subject: str, text: str, cure: str) -> Finding:
    """It works, but badly or not for long."""
    return Finding(subject, Level.WARNING, text, cure)


def error(subject: str, text: str, cure: str) -> Finding:
    """It doesn't work."""
    return Finding(subject, Level.ERROR, text, cure)
