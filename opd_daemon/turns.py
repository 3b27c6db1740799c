"""Whose turn it is: a crowd that waits for news is served a few at a time, so that it can't hold up the loop."""

from __future__ import annotations

import asyncio
from collections import deque

# A message takes an idle machine's loop about 0.1 ms: ten in a row delay a producer by 1 ms, a thousand by 100.
# The pause after each ten leaves the loop four fifths of its time for everyone else; on a busy machine, where messages
# take longer, so does the pause.
AT_ONCE = 10
PAUSE_SECONDS = 0.005
REST = 4


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
        now = asyncio.get_running_loop().time
        while self._ready:
            begin = now()
            for turn in [self._ready.popleft() for _ in range(min(AT_ONCE, len(self._ready)))]:
                if not turn.done():
                    turn.set_result(None)
            await asyncio.sleep(0)  # each of them goes on until it waits again
            if self._ready:
                await asyncio.sleep(max(PAUSE_SECONDS, REST * (now() - begin)))
        self._server = None
