"""Whose turn it is: a crowd that waits for news is served a few at a time, so that it can't hold up the loop."""

from __future__ import annotations

import asyncio
from collections import deque

# Sending one message takes the loop about 0.1 ms. Twenty in a row delay a producer by 2 ms, a thousand by 100; and with
# a pause after each twenty, watchers together take a fifth of the loop at most, however many they are.
AT_ONCE = 20
PAUSE_SECONDS = 0.01


class Turns:
    """Wakes waiting coroutines in the order in which they came, `AT_ONCE` at a time. Belongs to one event loop.

    Whoever has waited a round finds all that has happened meanwhile: the larger the crowd, the larger its batches.
    """

    def __init__(self) -> None:
        self._idle: dict[asyncio.Future[None], None] = {}
        self._ready: deque[asyncio.Future[None]] = deque()
        self._server: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """Wait for a turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._enqueue(turn)
        await turn

    async def wait(self, seconds: float) -> None:
        """Wait for news, for up to `seconds`, and then for a turn."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._idle[turn] = None
        timer = loop.call_later(max(seconds, 0.0), self._give_up, turn)
        try:
            await turn
        finally:
            timer.cancel()
            self._idle.pop(turn, None)

    def announce(self) -> None:
        """There is news: everyone who waits for it gets a turn."""
        waiting, self._idle = self._idle, {}
        self._enqueue(*waiting)

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._idle:
            del self._idle[turn]
            self._enqueue(turn)

    def _enqueue(self, *turns: asyncio.Future[None]) -> None:
        self._ready.extend(turns)
        if self._ready and self._server is None:
            self._server = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while self._ready:
            for turn in [self._ready.popleft() for _ in range(min(AT_ONCE, len(self._ready)))]:
                if not turn.done():
                    turn.set_result(None)
            await asyncio.sleep(PAUSE_SECONDS if self._ready else 0)
        self._server = None
