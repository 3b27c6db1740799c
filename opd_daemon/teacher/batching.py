"""Work waiting for the engine, and the choice of what is computed together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from itertools import islice

from opd_daemon.errors import OpdError
from opd_daemon.teacher.fair_queue import SCANNED_ITEMS, FairQueue
from opd_daemon.teacher.sharing import WORTH, common_prefix, saving
from opd_daemon.types import GeneratedToken, GenerateRequest, ScoreRequest, Scores

# Sequences this close in length share a batch; short ones don't waste much whatever they are padded to.
LENGTH_SPREAD = 0.25
LENGTH_SLACK = 32
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
    stops: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stops = frozenset(self.request.stop_token_ids)

    @property
    def tokens(self) -> int:
        """Size for limits."""
        return len(self.request.prompt_ids) + self.request.max_tokens


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of one forward pass: `alone`, or `contended` while several clients want the teacher.

    small: a client with no more than this waiting then gets all of it done in one pass.
    """

    alone: int
    contended: int
    small: int


@dataclass(frozen=True, slots=True)
class Places:
    """Sequences decoded at once: `most`, of any one client `alone`, or `contended` while several want the teacher.

    prefilled: prompts computed at once, and of any one client; contended_tokens: as many of theirs while several
    clients want the teacher, but for one prompt of each, which is computed in pieces.
    """

    most: int
    alone: int
    contended: int
    prefilled: int
    prefilled_of_one: int
    contended_tokens: int


def next_batch(queue: FairQueue[ScoreItem], budget: Budget, *, shares: bool) -> list[ScoreItem]:
    """The item that is due and others that go well with it, within the budget of tokens in one forward pass.

    While several clients want the teacher, one with little waiting gets it done in one pass; the passes of others are
    short, and they don't ride along in its. So a flood costs it one short pass of waiting. Passes of items that are
    computed apart stay as they are, for what is in one decides the last bits of its results.

    shares: whether the model can compute what they all begin with once; then those that save most of the work that way
    come together. Else they are of about one length, as they are padded to it.
    """
    items = list(islice(queue.in_turn(), SCANNED_ITEMS))
    apart = items[0].together if items else None
    if apart is not None:
        items = queue.items_of(items[0].client)  # whoever else waits
    items = [item for item in items if item.together is apart]
    tokens = budget.alone
    if items and apart is None and len(queue.clients) > 1:
        own = items[0].client
        tokens = budget.small if queue.tokens_of(own) <= budget.small else budget.contended
        items = [item for item in items if item.client == own or queue.tokens_of(item.client) <= tokens]
    return (_sharing(items, tokens) if shares else []) or _alike(items, tokens)


def joining(
    queue: FairQueue[GenerationItem],
    decoding: Collection[GenerationItem],
    prefilling: Collection[GenerationItem],
    places: Places,
    *,
    contended: bool,
) -> list[GenerationItem]:
    """Waiting prompts that may join those `decoding`, in turn; `prefilling` are the ones of them without a token yet.

    While several clients want the teacher, none has more than a few sequences there nor many tokens of prompts in one
    round, as everybody waits for the slowest round. So there is room at once for a client that comes later.
    """
    held = Counter(item.client for item in decoding)
    reading = Counter(item.client for item in prefilling)
    of_one = places.contended if contended else places.alone
    tokens = sum(len(item.request.prompt_ids) for item in prefilling)
    room = min(places.most - held.total(), places.prefilled - reading.total())
    chosen: list[GenerationItem] = []
    for item in queue.in_turn():
        if len(chosen) >= room:
            break
        size = len(item.request.prompt_ids)
        too_long = contended and reading[item.client] and tokens + size > places.contended_tokens
        if held[item.client] < of_one and reading[item.client] < places.prefilled_of_one and not too_long:
            held[item.client] += 1
            reading[item.client] += 1
            tokens += size
            chosen.append(item)
    return chosen


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
    pieces: int = field(default=0)

    @property
    def clients(self) -> set[str]:
        """Whose it is."""
        return {item.client for item in self.items}

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of it any more."""
        return all(item.cancelled or item.expired for item in self.items)

    def shares(self) -> list[float]:
        """Milliseconds of this batch that fall to each item, by tokens."""
        total = sum(item.tokens for item in self.items)
        return [1000 * self.seconds * item.tokens / total for item in self.items]
