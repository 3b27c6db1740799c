"""Files that hold a token: made for their owner alone, and refused when anybody else may read them."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from opd_daemon.errors import OpdError, Reason

SHORTEST_TOKEN = 32
LONGEST_FILE = 4096
CURE = "let the daemon make one with 'opd serve --token-file FILE'"


def read_token(path: Path) -> str:
    """The token in a file that only its owner can read.

    Raises:
        OpdError: WRONG_TOKEN for a file that is missing, open to others, not a plain file, or holds no token.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as fault:
        why = getattr(fault, "strerror", None) or "not a path"
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: can't be read ({why}); {CURE}") from None
    with os.fdopen(descriptor, "rb") as file:
        # Of the open file, not of the path: nobody can exchange it in between.
        _require_private(path, os.fstat(file.fileno()))
        content = file.read(LONGEST_FILE + 1)
    token = content.decode("ascii", "replace").strip()
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_FILE or not (token.isascii() and token.isprintable()):
        message = f"{path}: holds no token, which has {SHORTEST_TOKEN} or more printable characters; {CURE}"
        raise OpdError(Reason.WRONG_TOKEN, message)
    return token


def kept_token(path: Path) -> str:
    """The token in a file; a new file with a new token where there is none.

    Raises:
        OpdError: WRONG_TOKEN as `read_token`, or when the file can't be written.
    """
    token = secrets.token_urlsafe(32)
    try:
        # Exclusively: a file or link that somebody else put there is never written to.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return read_token(path)
    except (OSError, ValueError) as fault:
        why = getattr(fault, "strerror", None) or "not a path"
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: can't be written ({why}); choose another file") from None
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{token}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: can't be written ({fault.strerror})") from None
    return token


def _require_private(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: not a plain file; {CURE}")
    if facts.st_uid not in (os.geteuid(), 0):
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: belongs to another user; {CURE}")
    mode = stat.S_IMODE(facts.st_mode)
    if mode & 0o077:
        cure = f"run 'chmod 600 {path}', and replace the token if others may have seen it"
        raise OpdError(Reason.WRONG_TOKEN, f"{path}: others may read it (mode {mode:04o}); {cure}", mode=f"{mode:04o}")
