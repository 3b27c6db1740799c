"""The one thread that owns MLX: it loads, scores and generates, in turns, and outlives any of it failing."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn, TypeVar

import mlx.core as mx

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher.batching import Budget, GenerationItem, RunningBatch, ScoreItem, next_batch
from opd_daemon.teacher.fair_queue import FairQueue, Item
from opd_daemon.teacher.generation import Generation
from opd_daemon.teacher.loading import LoadedModel, free_memory, wire
from opd_daemon.teacher.memory import is_out_of_memory, out_of_memory
from opd_daemon.teacher.pace import Pace
from opd_daemon.teacher.refusals import changed, not_loaded, shutting_down
from opd_daemon.teacher.scoring import score_batch
from opd_daemon.teacher.tally import WorkTally

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Freed memory that MLX keeps for reuse, at most; on a CPU, where malloc gives new memory fast, less.
BUFFER_BYTES, HOST_BUFFER_BYTES = 1 << 30, 256 << 20
# A client with less than this part of the queue may add to it when others have filled it.
SHARES = 8


class Engine:
    """Public methods may be called from any thread; everything private runs on the engine's own."""

    def __init__(self, *, token_budget: int, piece: int, max_queue_tokens: int) -> None:
        small = min(token_budget, piece)
        self._budget = Budget(token_budget, contended=max(1, small // 2), small=small)
        self._piece = piece
        self._max_queue_tokens = max_queue_tokens
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._scores: FairQueue[ScoreItem] = FairQueue()
        self._generations: FairQueue[GenerationItem] = FairQueue()
        self._alone: deque[ScoreItem] = deque()
        self._batches: list[RunningBatch] = []
        self._generation: Generation | None = None
        self._loaded: LoadedModel | None = None
        self._digest = ""
        self.work = WorkTally()
        self._scoring_seconds = self._generating_seconds = 0.0
        self._pace = Pace()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="teacher-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the piece it is at; whatever waits fails with SHUTTING_DOWN."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the thread, before any waiting work."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise shutting_down()
            self._jobs.append((future, job))
            self._wake.notify()
        return future

    def replace(
        self, digest: str, eos_token_ids: Sequence[int], load: Callable[[], tuple[LoadedModel, T]]
    ) -> Future[tuple[LoadedModel, T]]:
        """Drop the model as `drop` does, then load the one with `digest`; gives what `load` returns."""

        def exchange() -> tuple[LoadedModel, T]:
            self._drop_model()
            loaded, companion = load()
            wire(loaded.weight_bytes)
            self._loaded, self._generation = loaded, Generation(loaded, eos_token_ids, self._piece)
            self._digest = digest
            return loaded, companion

        return self.submit(exchange)

    def ask(self, question: Callable[[LoadedModel], T]) -> Future[T]:
        """Run `question` with the model, which must not leave the thread. Fails with TEACHER_NOT_LOADED."""

        def answer() -> T:
            if self._loaded is None:
                raise not_loaded()
            return question(self._loaded)

        return self.submit(answer)

    def drop(self) -> Future[None]:
        """Free the model; all its work fails with TEACHER_CHANGED."""
        return self.submit(self._drop_model)

    def score(self, digest: str, items: Sequence[ScoreItem]) -> None:
        """Queue sequences for the model with `digest`. Raises QUEUE_FULL or TEACHER_CHANGED, taking none."""
        self._enqueue(self._scores, digest, items)

    def generate(self, digest: str, items: Sequence[GenerationItem]) -> None:
        """Queue prompts for the model with `digest`. Raises QUEUE_FULL or TEACHER_CHANGED, taking none."""
        self._enqueue(self._generations, digest, items)

    def cancel(self, items: Sequence[ScoreItem] | Sequence[GenerationItem]) -> None:
        """Forget items: waiting ones leave at once, running ones before the next piece or token."""
        with self._wake:
            for item in items:
                item.cancelled = True
                if isinstance(item, ScoreItem):
                    self._scores.discard(item)
                else:
                    self._generations.discard(item)

    @property
    def digest(self) -> str:
        """Digest of the model that work is taken for; empty without one."""
        return self._digest

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._scores.tokens + self._generations.tokens

    def _drop_model(self) -> None:
        with self._wake:
            # From here on nothing is queued any more for this model.
            self._digest = ""
        self._fail_all(changed())
        self._generation = self._loaded = None
        free_memory()
        wire(0)

    def _enqueue(self, queue: FairQueue[Item], digest: str, items: Sequence[Item]) -> None:
        tokens = sum(item.tokens for item in items)
        with self._wake:
            if self._closing:
                raise shutting_down()
            if digest != self._digest:
                raise changed()
            if items:
                self._require_room(items[0].client, tokens)
            for item in items:
                queue.add(item)
            self._wake.notify()

    def _require_room(self, client: str, tokens: int) -> None:
        """Refuse work that would make the queue too long, but for a share of it, which every client has of its own.

        Who has nothing there may bring more than a share at once: a call is taken whole, or never would be.
        """
        waiting, limit = self.queued_tokens, self._max_queue_tokens
        if waiting + tokens <= limit:
            return
        share = limit // SHARES
        held = self._scores.tokens_by_client() + self._generations.tokens_by_client()
        own = held.pop(client, 0)
        taken = sum(min(share, size) for size in held.values())
        if (not own or own + tokens <= share) and taken + min(share, own + tokens) <= limit:
            return
        seconds = self._pace.seconds(waiting + tokens - limit)
        raise OpdError(
            Reason.QUEUE_FULL,
            f"{waiting} tokens wait for the teacher already (limit {limit}); try again in {seconds:.1f} s",
            queued_tokens=waiting,
            limit=limit,
            retry_after_milliseconds=round(1000 * seconds),
        )

    def _run(self) -> None:
        on_host = mx.default_device() == mx.Device(mx.cpu)
        mx.set_cache_limit(HOST_BUFFER_BYTES if on_host else BUFFER_BYTES)
        try:
            while work := self._next_work():
                try:
                    work()
                except Exception as error:  # noqa: BLE001 - a thread that ends here would leave every caller waiting
                    self._fail_all(_as_opd_error(error, "the teacher's work"))
        except BaseException:
            # Without this thread there is no teacher, and nothing can be trusted about why: a service manager starts
            # the daemon again, runs go on from their checkpoints.
            logger.critical("the teacher's thread died; the daemon leaves", exc_info=True)
            os._exit(os.EX_SOFTWARE)
        finally:
            self._fail_all(shutting_down())
            for future, _ in self._jobs:
                _resolve(future, _refuse)
            self._generation = self._loaded = None
            free_memory()
            # Without these the interpreter may abort when it exits after a thread that used MLX.
            mx.synchronize()
            mx.clear_streams()

    def _next_work(self) -> Callable[[], None] | None:
        with self._wake:
            while not self._closing:
                if self._jobs:
                    return partial(_resolve, *self._jobs.popleft())
                scoring = bool(self._batches or self._alone or self._scores)
                generating = bool(self._generation or self._generations)
                if not (scoring and generating):
                    self._scoring_seconds = self._generating_seconds = 0.0
                if scoring and (not generating or self._scoring_seconds <= self._generating_seconds):
                    return self._score_piece
                if generating:
                    return self._generate_step
                self._wake.wait()
        return None

    def _score_piece(self) -> None:
        started = time.perf_counter()
        if self._lets_others_before() and (begun := self._start_batch()):
            self._batches.append(begun)
        if not self._batches:
            return
        batch = self._batches[-1]
        if batch.abandoned:
            self._end_of(batch)
            _refuse_expired(batch.items)
            return
        try:
            next(batch.work)
            batch.pieces += 1
            batch.seconds += time.perf_counter() - started
        except StopIteration as end:
            self._end_of(batch)
            batch.seconds += time.perf_counter() - started
            tokens = sum(item.tokens for item in batch.items)
            self._pace.measured(tokens, batch.seconds)
            self.work.scored(len(batch.items), tokens)
            for item, result, share in zip(batch.items, end.value, batch.shares(), strict=True):
                item.deliver(result, share)
        except Exception as error:  # noqa: BLE001 - one batch fails, the engine goes on
            self._end_of(batch)
            self._fail_batch(batch.items, error)
        self._scoring_seconds += time.perf_counter() - started

    def _lets_others_before(self) -> bool:
        """Whether a batch is to be started now: the only one, or a small one of another client, between two pieces.

        Then at least one piece of the batch under way comes before the next that goes before it.
        """
        if not self._batches:
            return True
        (under_way, *others) = self._batches
        if others or not under_way.pieces:
            return False
        with self._wake:
            due = next(self._scores.in_turn(), None)
            return (
                due is not None
                and due.together is None
                and due.client not in under_way.clients
                and self._scores.tokens_of(due.client) <= self._budget.small
            )

    def _end_of(self, batch: RunningBatch) -> None:
        self._batches.remove(batch)
        for under_way in self._batches:
            under_way.pieces = 0

    def _start_batch(self) -> RunningBatch | None:
        with self._wake:
            if self._alone:
                items = [self._alone.popleft()]
            else:
                expired = [item for item in self._scores.in_turn() if item.expired]
                for item in expired:
                    self._scores.discard(item)
                _refuse_expired(expired)
                shares = self._loaded is not None and self._loaded.shares_prefixes
                items = next_batch(self._scores, self._budget, shares=shares)
                self._scores.take(items)
        if not items or self._loaded is None:
            return None
        return RunningBatch(items, score_batch(self._loaded, [item.request for item in items], self._piece))

    def _fail_batch(self, items: Sequence[ScoreItem], error: Exception) -> None:
        if len(items) > 1:
            # One sequence may be at fault or the batch too large, so each gets a second chance alone.
            _release(error)
            self._alone.extend(items)
            return
        _deliver_all(items, _as_opd_error(error, "scoring"))

    def _generate_step(self) -> None:
        started = time.perf_counter()
        if self._generation is None:
            return
        with self._wake:
            wanting = self._generations.clients | self._generation.clients | self._scores.clients
            contended = len(wanting) > 1
            joining = self._generation.joining(self._generations, contended=contended)
            self._generations.take(joining)
        try:
            if joining:
                self._generation.add(joining)
            self.work.generated_tokens += self._generation.step(contended=contended)
        except Exception as error:  # noqa: BLE001 - these sequences fail, the engine goes on
            self._generation.fail(_as_opd_error(error, "generation"))
        self._generating_seconds += time.perf_counter() - started

    def _fail_generations(self, error: OpdError) -> None:
        with self._wake:
            waiting = self._generations.drain()
        for item in waiting:
            item.deliver(error)
        if self._generation is not None:
            self._generation.fail(error)

    def _fail_all(self, error: OpdError) -> None:
        with self._wake:
            running = [item for batch in self._batches for item in batch.items]
            items = [*self._scores.drain(), *self._alone, *running]
            self._alone.clear()
            self._batches.clear()
        _deliver_all(items, error)
        self._fail_generations(error)


def _deliver_all(items: Sequence[ScoreItem], error: OpdError) -> None:
    for item in items:
        item.deliver(error, 0.0)


def _refuse_expired(items: Sequence[ScoreItem]) -> None:
    expired = [item for item in items if item.expired]
    _deliver_all(expired, OpdError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the teacher was done"))


def _refuse() -> NoReturn:
    raise shutting_down()


def _resolve(future: Future[T], job: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except BaseException as error:  # noqa: BLE001 - it is raised again where the future is awaited
        _release(error)
        future.set_exception(error)
    else:
        future.set_result(result)


def _release(error: BaseException) -> None:
    """Free the arrays that the frames of a failure still hold; errors may be kept for long."""
    link: BaseException | None = error
    while link:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    free_memory()


def _as_opd_error(error: Exception, what: str) -> OpdError:
    if isinstance(error, OpdError):
        return error
    if is_out_of_memory(error):
        _release(error)
        return out_of_memory(what)
    logger.error("%s failed", what, exc_info=error)
    _release(error)
    message = f"{what} failed in the teacher; the daemon's log has more"
    return OpdError(Reason.INTERNAL, message)
