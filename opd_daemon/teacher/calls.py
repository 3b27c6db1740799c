"""One call to the teacher, from requests to results: from the cache what it knows, from the engine the rest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from opd_daemon.errors import RETRY_AFTER, OpdError, Reason
from opd_daemon.teacher.batching import GenerationItem, ScoreItem
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.engine import Engine
from opd_daemon.teacher.mailbox import Mailbox
from opd_daemon.teacher.payload import (
    Entry,
    entry_scores,
    entry_tokens,
    generation_key,
    repeatable,
    score_key,
    scores_entry,
    tokens_entry,
)
from opd_daemon.types import CachedScores, GeneratedToken, GenerateRequest, ScoreRequest, Scores, TeacherInfo

# Read from the cache together, in turns with other calls: entries, and their bytes unless one is larger.
ENTRIES_AT_ONCE, ENTRY_BYTES_AT_ONCE = 16, 8 << 20
# Scores of one call that may wait for its reader: enough for several forward passes of a large model.
BYTES_AHEAD = 64 << 20

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Desk:
    """Where calls are served: the engine, the cache, and threads for its files."""

    engine: Engine
    cache: TeacherCache
    files: Executor


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks whom: the teacher of `info`, which need not be in memory; `absent` says why not (missing, total).

    apart: no other call shares its forward passes.
    """

    desk: Desk
    info: TeacherInfo
    absent: Callable[[int, int], OpdError]
    client: str
    use_cache: bool
    apart: bool = False

    def require_teacher(self, missing: int, total: int) -> None:
        """Make sure that what the cache lacks can be computed. Raises TEACHER_NOT_LOADED or TEACHER_CHANGED."""
        if missing and self.desk.engine.digest != self.info.digest:
            raise self.absent(missing, total)


class Lookup(Generic[Request, Answer]):
    """The part of a call that the cache may answer. An empty address is neither looked up nor counted."""

    def __init__(self, desk: Desk, requests: Sequence[Request], decode: Callable[[Entry, Request], Answer]) -> None:
        self._desk = desk
        self.requests = requests
        self._decode = decode
        self.addresses = [""] * len(requests)
        self.stored: list[int] = []
        self.missing = list(range(len(requests)))

    async def find(self, address: Callable[[Request], str]) -> None:
        """Compute all addresses and split the requests into stored and missing ones."""
        loop = asyncio.get_running_loop()
        self.addresses = await loop.run_in_executor(
            self._desk.files, lambda: [address(request) for request in self.requests]
        )
        known = [bool(address) and address in self._desk.cache for address in self.addresses]
        self.stored = [index for index, found in enumerate(known) if found]
        self.missing = [index for index, found in enumerate(known) if not found]
        self._desk.cache.count_misses(sum(1 for index in self.missing if self.addresses[index]))

    async def read(self) -> AsyncGenerator[tuple[int, tuple[Answer, float] | None], None]:
        """The stored answers with the milliseconds they save; None where an entry was no good after all."""
        loop = asyncio.get_running_loop()
        for group in self._groups():
            found = await loop.run_in_executor(self._desk.files, self._read, group)
            for index, hit in zip(group, found, strict=True):
                yield index, hit

    def _groups(self) -> Iterator[list[int]]:
        group: list[int] = []
        size = 0
        for index in self.stored:
            entry = self._desk.cache.size(self.addresses[index])
            if group and (len(group) == ENTRIES_AT_ONCE or size + entry > ENTRY_BYTES_AT_ONCE):
                yield group
                group, size = [], 0
            group.append(index)
            size += entry
        if group:
            yield group

    def _read(self, indices: Sequence[int]) -> list[tuple[Answer, float] | None]:
        return [self._read_one(index) for index in indices]

    def _read_one(self, index: int) -> tuple[Answer, float] | None:
        request = self.requests[index]
        return self._desk.cache.read(self.addresses[index], lambda entry: self._decode(entry, request))


async def scores(
    call: Call, requests: Sequence[ScoreRequest], *, deadline: float | None
) -> AsyncGenerator[tuple[int, CachedScores], None]:
    """Scores of valid requests, each with its index, as they are ready."""
    lookup = Lookup(call.desk, requests, entry_scores)
    running = Scoring(call, lookup, deadline)
    try:
        if call.use_cache:
            await lookup.find(partial(score_key, call.info))
        running.start(lookup.missing)
        async for index, hit in lookup.read():
            if hit:
                yield index, CachedScores(hit[0], cached=True, milliseconds=hit[1])
            else:
                running.start([index])
        async for index, scored in running.results():
            yield index, scored
    finally:
        running.cancel()


class Scoring:
    """The sequences of one call that the engine scores.

    Not more is computed ahead of a reader than `BYTES_AHEAD`, so that one who stops reading costs no more memory. What
    is computed apart is queued all at once: what shares its passes must not hang on how fast it is read.
    """

    def __init__(self, call: Call, lookup: Lookup[ScoreRequest, Scores], deadline: float | None) -> None:
        self._call = call
        self._requests = lookup.requests
        self._lookup = lookup
        self._deadline = deadline
        self._mailbox: Mailbox[tuple[int, Scores | OpdError, float]] = Mailbox()
        self._items: list[ScoreItem] = []
        self._later: deque[int] = deque()
        self._ahead: dict[int, int] = {}

    def start(self, indices: Sequence[int]) -> None:
        """Queue some of the requests. Raises QUEUE_FULL, or why there is no teacher to do it."""
        self._call.require_teacher(len(indices), len(self._requests))
        self._later.extend(indices)
        self._go_on()

    async def results(self) -> AsyncGenerator[tuple[int, CachedScores], None]:
        """The scores of what was started, as they are ready."""
        while self._ahead or self._later:
            if self._later:
                await self._go_on_when_there_is_room()
            index, result, milliseconds = await self._mailbox.get()
            if isinstance(result, OpdError):
                raise result
            del self._ahead[index]
            yield index, CachedScores(result, cached=False, milliseconds=milliseconds)

    def cancel(self) -> None:
        """Forget what still runs."""
        self._call.desk.engine.cancel(self._items)

    async def _go_on_when_there_is_room(self) -> None:
        """Queue more; a queue that others have filled since is waited for, as this call was accepted before."""
        while True:
            try:
                self._go_on()
            except OpdError as full:
                if full.reason is not Reason.QUEUE_FULL:
                    raise
                if not self._ahead:
                    await asyncio.sleep(int(full.metadata[RETRY_AFTER]) / 1000)
                    continue
            return

    def _go_on(self) -> None:
        chosen: dict[int, int] = {}
        held = sum(self._ahead.values())
        for index in self._later:
            if held >= BYTES_AHEAD and not self._call.apart:
                break
            chosen[index] = _bytes_of_scores(self._requests[index], self._call.info)
            held += chosen[index]
        new = [self._item(index) for index in chosen]
        if new:
            self._call.desk.engine.score(self._call.info.digest, new)
        for _ in chosen:
            self._later.popleft()
        self._items.extend(new)
        self._ahead |= chosen

    def _item(self, index: int) -> ScoreItem:
        together = self._items if self._call.apart else None
        return ScoreItem(
            self._requests[index], self._call.client, partial(self._deliver, index), self._deadline, together
        )

    def _deliver(self, index: int, result: Scores | OpdError, milliseconds: float) -> None:
        # First kept, then handed over: whoever has it and asks again finds it.
        address = self._lookup.addresses[index]
        if address and isinstance(result, Scores):
            self._call.desk.cache.write(address, scores_entry(result, milliseconds))
        self._mailbox.post((index, result, milliseconds))


def _bytes_of_scores(request: ScoreRequest, info: TeacherInfo) -> int:
    """About how much memory a result takes."""
    wants = request.wants
    candidates = 0 if request.candidate_ids is None else request.candidate_ids.shape[1]
    numbers = 3 + 2 * wants.top_k + candidates + len(wants.log_z_temperatures)
    return 4 * request.rows * (numbers + (info.hidden_size if wants.hidden else 0))


class Completions:
    """The prompts of one call that the engine continues; finished repeatable completions go into the cache."""

    def __init__(self, call: Call, lookup: Lookup[GenerateRequest, Any]) -> None:
        self._call = call
        self._desk = call.desk
        self._requests = lookup.requests
        self._addresses = lookup.addresses
        self._mailbox: Mailbox[tuple[int, GeneratedToken | OpdError]] = Mailbox()
        self._running: dict[int, GenerationItem] = {}
        self._tokens: dict[int, list[GeneratedToken]] = {}

    def start(self, indices: Sequence[int]) -> None:
        """Queue some of the requests. Raises QUEUE_FULL, or why there is no teacher to do it."""
        self._call.require_teacher(len(indices), len(self._requests))
        client = self._call.client
        new = {index: GenerationItem(self._requests[index], client, self._receiver(index)) for index in indices}
        if new:
            self._desk.engine.generate(self._call.info.digest, list(new.values()))
            self._running |= new

    async def tokens(self) -> AsyncGenerator[tuple[int, GeneratedToken], None]:
        """Every token of what was started, as it comes."""
        while self._running:
            index, token = await self._mailbox.get()
            if isinstance(token, OpdError):
                raise token
            if self._addresses[index]:
                self._tokens.setdefault(index, []).append(token)
            if token.finish_reason:
                self._keep(index, self._running.pop(index))
            yield index, token

    def cancel(self) -> None:
        """Forget what still runs."""
        self._desk.engine.cancel(list(self._running.values()))

    def _receiver(self, index: int) -> Callable[[GeneratedToken | OpdError], None]:
        return lambda token: self._mailbox.post((index, token))

    def _keep(self, index: int, item: GenerationItem) -> None:
        if self._addresses[index]:
            self._desk.cache.write(self._addresses[index], tokens_entry(self._tokens.pop(index), item.milliseconds))


async def completions(
    call: Call, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[tuple[int, GeneratedToken], None]:
    """Tokens of valid requests, each with its request's index, as they come."""
    info = call.info
    lookup = Lookup(call.desk, requests, entry_tokens)
    if call.use_cache:
        await lookup.find(lambda request: generation_key(info, request) if repeatable(request) else "")
    running = Completions(call, lookup)
    try:
        running.start(lookup.missing)
        async for index, hit in lookup.read():
            if hit is None:
                running.start([index])
                continue
            for stored in hit[0]:
                yield index, stored
        async for index, token in running.tokens():
            yield index, token
    finally:
        running.cancel()
