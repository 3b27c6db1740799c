"""The daemon's log: lines for a person on stderr, JSON lines in a file that is rotated.

Where a service manager keeps stderr in a file of the log folder, that one begins anew when it has grown large.

Whatever a client makes the daemon say stays inside its own line: control characters, line ends and what turns the
direction of writing are escaped in both.
"""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

FILE, SERVICE_FILE = "daemon.jsonl", "service.log"
FILE_BYTES = 10 << 20
OLD_FILES = 5
LAYOUT = "%(asctime)s %(levelname)s %(name)s %(message)s"
FIELDS = ("levelname", "name", "message", "request_id", "run_id")
# grpcio's logger, and how its record of a write that nobody was there for begins.
GRPC, DEPARTURE = "grpc._cython.cygrpc", "ExecuteBatchError raised in core"

# Of the call and the run that the present task works for; empty for none.
request_id: ContextVar[str] = ContextVar("request_id", default="")
run_id: ContextVar[str] = ContextVar("run_id", default="")


def log_to_stderr(level: str) -> None:
    """Begin to log, for whoever looks at the terminal; what was set up before is dropped."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(LAYOUT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger(GRPC).addFilter(_is_no_departure)


def log_to_file(folder: Path) -> logging.Handler:
    """Log to the folder's file too. Raises OSError where that can't be written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = _LogFile(folder / FILE, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8")
    handler.setFormatter(EventFormatter())
    handler.addFilter(_with_context)
    logging.getLogger().addHandler(handler)
    return handler


def log_to_service_file(folder: Path) -> None:
    """If stderr is the folder's file for a service manager, don't let that grow without end."""
    try:
        kept = os.path.samestat(os.fstat(sys.stderr.fileno()), (folder / SERVICE_FILE).stat())
    except (OSError, ValueError):  # there is no such file, or stderr is none
        return
    if kept:
        for handler in logging.getLogger().handlers:
            handler.addFilter(_begin_anew)


def escaped(text: str) -> str:
    """The text in one line, with whatever doesn't print as an escape, as Python writes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class LineFormatter(logging.Formatter):
    """One line a record. The lines of a traceback are indented, so that none can pass for a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        head, *trace = super().format(_one_line(record)).split("\n")
        return "\n".join([head, *(f"    {escaped(line)}" for line in trace)])


class EventFormatter(JsonFormatter):
    """One JSON object a line, in ASCII: time, level, logger, message, ids, and what the record was given as extras."""

    def __init__(self) -> None:
        super().__init__(FIELDS, timestamp="time", rename_fields={"levelname": "level", "name": "logger"})

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        # JSON escapes all control characters but this one.
        return super().format(record).replace("\x7f", "\\u007f")


def _one_line(record: logging.LogRecord) -> logging.LogRecord:
    line = logging.makeLogRecord(record.__dict__)
    line.msg, line.args = escaped(record.getMessage()), None
    return line


def _is_no_departure(record: logging.LogRecord) -> bool:
    """Whether it is more than a client that left while its answer was written, for which grpcio prints a traceback."""
    return not record.getMessage().startswith(DEPARTURE)


def _begin_anew(_: logging.LogRecord) -> bool:
    """Empty stderr's file once it is as large as all files of the other log together, which say the same and more."""
    descriptor = sys.stderr.fileno()
    if os.fstat(descriptor).st_size > OLD_FILES * FILE_BYTES:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)  # for a service manager that did not open it for appending
    return True


def _with_context(record: logging.LogRecord) -> bool:
    for name, variable in (("request_id", request_id), ("run_id", run_id)):
        if not hasattr(record, name):
            setattr(record, name, variable.get())
    return True


class _LogFile(RotatingFileHandler):
    """A log file for its owner alone. When it can't be written, the daemon has better things to do than to say so."""

    def _open(self) -> TextIOWrapper:
        opener = partial(os.open, mode=0o600)
        return open(self.baseFilename, "a", encoding=self.encoding, opener=opener)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the record."""
