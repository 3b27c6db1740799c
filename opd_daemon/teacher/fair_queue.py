"""Waiting work, shared fairly: clients take turns, each client's oldest item goes first, who was just served last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

SCANNED_ITEMS = 512
# A client that asked for something so many seconds ago may well ask again.
LATELY_SECONDS = 5.0


class Waiting(Protocol):
    """What can wait: it has a client and a size in tokens."""

    @property
    def client(self) -> str:
        """Whose it is."""
        ...

    @property
    def tokens(self) -> int:
        """Its size."""
        ...


Item = TypeVar("Item", bound=Waiting)


@dataclass(slots=True)
class _Line(Generic[Item]):
    """One client's items in order: a dictionary serves as an ordered set, so one leaves the middle at once."""

    items: dict[Item, None] = field(default_factory=dict)
    tokens: int = 0


class FairQueue(Generic[Item]):
    """Waiting items by client. tokens: of all of them."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[Item]] = {}
        self._lately: dict[str, float] = {}
        self._served = ""
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def tokens_of(self, client: str) -> int:
        """Tokens one client has waiting."""
        line = self._lines.get(client)
        return line.tokens if line else 0

    def items_of(self, client: str) -> list[Item]:
        """The oldest of one client's items, in order."""
        line = self._lines.get(client)
        return list(islice(line.items, SCANNED_ITEMS)) if line else []

    def tokens_by_client(self) -> Counter[str]:
        """Tokens each client has waiting."""
        return Counter({client: line.tokens for client, line in self._lines.items()})

    @property
    def clients(self) -> set[str]:
        """Those that wait, or did a moment ago and may well come back."""
        self._forget_old()
        return self._lines.keys() | self._lately.keys()

    def add(self, item: Item) -> None:
        """Append to the end of its client's line; a client that had none waiting comes before the one served last."""
        line = self._lines.get(item.client)
        if line is None:
            line = self._lines[item.client] = _Line()
            self._to_the_back(self._served)
        line.items[item] = None
        line.tokens += item.tokens
        self.tokens += item.tokens
        self._lately.pop(item.client, None)
        self._lately[item.client] = time.monotonic()
        self._forget_old()

    def discard(self, item: Item) -> None:
        """Take one item out, if it still waits."""
        line = self._lines.get(item.client)
        if line is None or item not in line.items:
            return
        del line.items[item]
        line.tokens -= item.tokens
        self.tokens -= item.tokens
        if not line.items:
            del self._lines[item.client]

    def in_turn(self) -> Iterator[Item]:
        """All items in the order in which they are due."""
        lines = [iter(tuple(islice(line.items, SCANNED_ITEMS))) for line in self._lines.values()]
        while lines:
            still = []
            for line in lines:
                for item in islice(line, 1):
                    still.append(line)
                    yield item
            lines = still

    def take(self, items: Iterable[Item]) -> None:
        """Remove the items to be served now; the client of the first one goes to the back of the turn."""
        chosen = list(items)
        for item in chosen:
            self.discard(item)
        if chosen:
            self._served = chosen[0].client
            self._to_the_back(self._served)

    def drain(self) -> list[Item]:
        """Remove and return everything."""
        items = [item for line in self._lines.values() for item in line.items]
        self._lines.clear()
        self.tokens = 0
        return items

    def _to_the_back(self, client: str) -> None:
        if client in self._lines:
            self._lines[client] = self._lines.pop(client)

    def _forget_old(self) -> None:
        """The dictionary is in order of time, as every client that asks again goes to its end."""
        before = time.monotonic() - LATELY_SECONDS
        for client in [client for client, _ in _older(self._lately, before)]:
            del self._lately[client]


def _older(times: dict[str, float], before: float) -> Iterator[tuple[str, float]]:
    for client, when in times.items():
        if when >= before:
            return
        yield client, when
