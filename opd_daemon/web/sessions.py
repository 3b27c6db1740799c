"""How a browser gets in: a code that works once and soon, then a cookie. The daemon's token never enters a URL."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

CODE_SECONDS = 60.0
SESSION_SECONDS = 12 * 3600.0
# More are asked for by nobody in good faith; the oldest goes first.
MOST_CODES = 16
MOST_SESSIONS = 64


class Sessions:
    """Who may see the pages: holders of the daemon's token, and browsers that came with a code.

    `clock` gives seconds that never go backwards.
    """

    def __init__(self, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token.encode()
        self._codes = _Secrets(CODE_SECONDS, MOST_CODES, clock)
        self._sessions = _Secrets(SESSION_SECONDS, MOST_SESSIONS, clock)

    def holds_token(self, authorization: str) -> bool:
        """Whether an `Authorization` header carries the daemon's token; compared in constant time."""
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), self._token)

    def new_code(self) -> str:
        """A code that opens one session within a minute."""
        return self._codes.new()

    def redeem(self, code: str) -> str | None:
        """A new session for a code, which is used up; None for one that never was, is used or too old."""
        return self._sessions.new() if self._codes.take(code) else None

    def knows(self, session: str) -> bool:
        """Whether this session is open."""
        return session in self._sessions


class _Secrets:
    """Random strings with an end, kept as digests: a look-up's time says nothing about them."""

    def __init__(self, seconds: float, most: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._ends: dict[bytes, float] = {}

    def new(self) -> str:
        secret = secrets.token_urlsafe(32)
        while len(self._ends) >= self._most:
            del self._ends[next(iter(self._ends))]
        self._ends[_digest(secret)] = self._clock() + self._seconds
        return secret

    def __contains__(self, secret: str) -> bool:
        return self._ends.get(_digest(secret), 0.0) > self._clock()

    def take(self, secret: str) -> bool:
        return self._ends.pop(_digest(secret), 0.0) > self._clock()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
