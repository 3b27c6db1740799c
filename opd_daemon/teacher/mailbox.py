"""Results on their way from another thread to one reader on the event loop."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Made on the event loop; posted to from any thread; order is kept."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T] = asyncio.Queue()

    def post(self, value: T) -> None:
        """Hand over one value; does nothing once the loop is closed and nobody can read it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, value)

    async def get(self) -> T:
        """The next value."""
        return await self._queue.get()
