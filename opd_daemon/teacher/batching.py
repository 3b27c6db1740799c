"""Work waiting for the engine, and the choice of what is computed together."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from opd_daemon.errors import OpdError
from opd_daemon.teacher.sharing import WORTH, common_prefix, saving
from opd_daemon.types import GeneratedToken, GenerateRequest, ScoreRequest, Scores

# Sequences this close in length share a batch; short ones don't waste much whatever they are padded to.
LENGTH_SPREAD = 0.25
LENGTH_SLACK = 32
SCANNED_ITEMS = 512
# A shorter beginning is not looked for.
LEAST_PREFIX = 8


@dataclass(eq=False, slots=True)
class ScoreItem:
    """One sequence to score. `deliver` is called once, on the engine's thread, with the result and milliseconds.

    together: only items of the same value share a forward pass.
    """

    request: ScoreRequest
    client: str
    deliver: Callable[[Scores | OpdError, float], None]
    deadline: float | None = None
    together: object = None
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Size for budgets and limits."""
        return len(self.request.token_ids)

    @property
    def expired(self) -> bool:
        """Whether `deadline`, in `time.monotonic` seconds, has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(eq=False, slots=True)
class GenerationItem:
    """One prompt to continue. `deliver` is called for every token, or once with the error that ended it."""

    request: GenerateRequest
    client: str
    deliver: Callable[[GeneratedToken | OpdError], None]
    cancelled: bool = False
    milliseconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Size for limits."""
        return len(self.request.prompt_ids) + self.request.max_tokens


Item = TypeVar("Item", ScoreItem, GenerationItem)


class FairQueue(Generic[Item]):
    """Waiting items: clients take turns, each client's oldest item goes first."""

    def __init__(self) -> None:
        # Dictionaries serve as ordered sets: an item leaves the middle at once when it is cancelled.
        self._clients: dict[str, dict[Item, None]] = {}
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, item: Item) -> None:
        """Append to the end of its client's line."""
        self._clients.setdefault(item.client, {})[item] = None
        self.tokens += item.tokens

    def discard(self, item: Item) -> None:
        """Take one item out, if it still waits."""
        waiting = self._clients.get(item.client, {})
        if item in waiting:
            del waiting[item]
            self.tokens -= item.tokens
            if not waiting:
                del self._clients[item.client]

    def in_turn(self) -> Iterator[Item]:
        """All items in the order in which they are due."""
        lines = [iter(tuple(islice(waiting, SCANNED_ITEMS))) for waiting in self._clients.values()]
        while lines:
            still = []
            for line in lines:
                for item in islice(line, 1):
                    still.append(line)
                    yield item
            lines = still

    def take(self, items: Iterable[Item]) -> None:
        """Remove chosen items; the client of the first one goes to the back of the turn."""
        chosen = list(items)
        for item in chosen:
            self.discard(item)
        if chosen and chosen[0].client in self._clients:
            self._clients[chosen[0].client] = self._clients.pop(chosen[0].client)

    def drain(self) -> list[Item]:
        """Remove and return everything."""
        items = [item for waiting in self._clients.values() for item in waiting]
        self._clients.clear()
        self.tokens = 0
        return items


def next_batch(queue: FairQueue[ScoreItem], token_budget: int, *, shares: bool) -> list[ScoreItem]:
    """The item that is due and others that go well with it, at most `token_budget` tokens in one forward pass.

    shares: whether the model can compute what they all begin with once; then those that save most of the work that way
    come together. Else they are of about one length, as they are padded to it.
    """
    items = list(islice(queue.in_turn(), SCANNED_ITEMS))
    items = [item for item in items if item.together is items[0].together]
    return (_sharing(items, token_budget) if shares else []) or _alike(items, token_budget)


def _alike(items: list[ScoreItem], token_budget: int) -> list[ScoreItem]:
    batch: list[ScoreItem] = []
    longest = 0
    for item in items:
        size = item.tokens
        if batch and abs(size - batch[0].tokens) > max(LENGTH_SLACK, LENGTH_SPREAD * batch[0].tokens):
            continue
        if batch and max(longest, size) * (len(batch) + 1) > token_budget:
            continue
        batch.append(item)
        longest = max(longest, size)
    return batch


def _sharing(items: list[ScoreItem], token_budget: int) -> list[ScoreItem]:
    """The due item and those with whose beginning it saves most; empty where none saves enough."""
    due = items[:1]
    common = [common_prefix(due[0].request.token_ids, item.request.token_ids) for item in items[1:]]
    best: list[ScoreItem] = []
    most = WORTH
    for prefix in {length for length in common if length >= LEAST_PREFIX}:
        others = [item for item, length in zip(items[1:], common, strict=True) if length >= prefix]
        batch = due + _within(others, prefix, token_budget - (due[0].tokens - prefix))
        saved = saving(prefix, [item.tokens for item in batch])
        if saved >= most:
            best, most = batch, saved
    return best


def _within(items: list[ScoreItem], prefix: int, tokens: int) -> list[ScoreItem]:
    """Those that fit one after another into `tokens`, their common prefix not counted."""
    chosen = []
    for item in items:
        if item.tokens - prefix <= tokens:
            chosen.append(item)
            tokens -= item.tokens - prefix
    return chosen


@dataclass(eq=False, slots=True)
class RunningBatch:
    """A batch the engine is working on; `work` pauses between pieces."""

    items: list[ScoreItem]
    work: Generator[None, None, list[Scores | OpdError]]
    seconds: float = field(default=0.0)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of it any more."""
        return all(item.cancelled or item.expired for item in self.items)

    def shares(self) -> list[float]:
        """Milliseconds of this batch that fall to each item, by tokens."""
        total = sum(item.tokens for item in self.items)
        return [1000 * self.seconds * item.tokens / total for item in self.items]
