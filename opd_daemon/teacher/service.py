"""The teacher as the rest of the daemon sees it: asyncio in front, the engine's thread and the disk behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.calls import Call, Desk, completions, scores
from opd_daemon.teacher.digest import DigestMemo
from opd_daemon.teacher.engine import Engine, not_loaded
from opd_daemon.teacher.export import export_head
from opd_daemon.teacher.known import KnownTeachers
from opd_daemon.teacher.loader import Loader, Resident
from opd_daemon.teacher.mailbox import Mailbox
from opd_daemon.teacher.speculative import Speculated, Speculation, SpeculativeToken, speculate
from opd_daemon.teacher.tally import MemoryUse, WorkTally
from opd_daemon.teacher.tokenizer import TextTokenizer
from opd_daemon.teacher.validation import check_generations, check_scores
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import (
    CachedScores,
    CacheStats,
    GeneratedToken,
    GenerateRequest,
    LoadProgress,
    ScoreRequest,
    TeacherInfo,
    TeacherState,
)

FILE_THREADS = 4
KNOWN_TEACHERS = "teachers.json"


class TeacherService:
    """Loads one teacher at a time and answers for it. Use from one event loop, between `start` and `close`.

    cache_dir, cache_limit_bytes: answers on disk. digest_memo: file with digests already computed; beside it are kept
    the facts of teachers that were loaded. token_budget: tokens of one forward pass. piece: positions between two
    chances to cancel or to take turns. max_queue_tokens: tokens that may wait. buffer_bytes: freed memory that MLX may
    keep for reuse.
    """

    def __init__(
        self,
        cache_dir: Path,
        digest_memo: Path,
        *,
        cache_limit_bytes: int,
        token_budget: int = 2048,
        piece: int = 512,
        max_queue_tokens: int = 1 << 20,
        buffer_bytes: int = 1 << 30,
    ) -> None:
        self._files = ThreadPoolExecutor(FILE_THREADS, "teacher-files")
        self._cache = TeacherCache(cache_dir, cache_limit_bytes)
        self._engine = Engine(
            token_budget=token_budget, piece=piece, max_queue_tokens=max_queue_tokens, buffer_bytes=buffer_bytes
        )
        self._desk = Desk(self._engine, self._cache, self._files)
        self._known = KnownTeachers(digest_memo.with_name(KNOWN_TEACHERS))
        self._loader = Loader(self._engine, DigestMemo(digest_memo), self._known, self._files)
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and index the cache."""
        self._engine.start()
        await asyncio.to_thread(self._cache.open)

    async def close(self) -> None:
        """Stop after the piece in progress and finish writing the cache. Waiting calls fail with SHUTTING_DOWN."""
        await asyncio.to_thread(self._engine.close)
        if self._loading:
            await asyncio.wait([self._loading])
        await asyncio.to_thread(self._cache.close)
        await asyncio.to_thread(self._files.shutdown)

    @property
    def state(self) -> TeacherState:
        """UNLOADED, LOADING, READY (also while a load is still checking its files), or FAILED."""
        if self._loader.resident:
            return TeacherState.READY
        if self._busy():
            return TeacherState.LOADING
        return TeacherState.FAILED if self._loader.failure else TeacherState.UNLOADED

    @property
    def info(self) -> TeacherInfo | None:
        """Facts of the teacher while READY."""
        return self._loader.resident.info if self._loader.resident else None

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the teacher."""
        return self._engine.queued_tokens

    @property
    def work(self) -> WorkTally:
        """What the engine has done since the start."""
        return self._engine.work

    def memory(self) -> MemoryUse:
        """What MLX's arrays take."""
        return MemoryUse(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())

    @property
    def failure(self) -> OpdError | None:
        """Why the last load failed, while FAILED."""
        return self._loader.failure

    async def load(self, path_or_hub_id: str) -> AsyncGenerator[LoadProgress, None]:
        """Load a teacher in place of the present one, reporting progress; the last report has the phase ready.

        A model that is loaded already is ready at once. A caller that stops listening doesn't stop the load. Raises
        TEACHER_LOADING, MODEL_NOT_FOUND, TEACHER_LOAD_FAILED or OUT_OF_MEMORY; if the fault shows before weights are
        read, the present teacher stays.
        """
        self._refuse_while_loading()
        mailbox: Mailbox[LoadProgress | OpdError] = Mailbox()
        self._loading = asyncio.create_task(self._loader.load(path_or_hub_id, mailbox.post))
        phase = ""
        while phase != "ready":
            report = await mailbox.get()
            if isinstance(report, OpdError):
                raise report
            phase = report.phase
            yield report

    async def unload(self) -> None:
        """Free the teacher's memory; calls under way fail with TEACHER_CHANGED. Raises TEACHER_LOADING."""
        self._refuse_while_loading()
        await self._loader.unload()

    def meant(self, digest: str = "", tokenizer_digest: str = "") -> TeacherInfo:
        """The teacher a call is for: the one in memory, or one known by its digest, for which the cache answers.

        Empty digests mean whichever is in memory. Raises TEACHER_NOT_LOADED, TEACHER_LOADING, TEACHER_CHANGED or
        TOKENIZER_MISMATCH.
        """
        known = self._known.find(digest) if digest and digest != self._engine.digest else None
        if known is None:
            return self.loaded(digest, tokenizer_digest)
        _check_tokenizer(known, tokenizer_digest)
        return known

    def loaded(self, digest: str = "", tokenizer_digest: str = "") -> TeacherInfo:
        """The teacher in memory, provided it is the one that is meant. Raises as `meant`."""
        info = self.info
        if info is None:
            self._refuse_while_loading()
            raise not_loaded()
        _check_tokenizer(info, tokenizer_digest)
        if digest and digest != info.digest:
            message = f"the teacher is {info.digest[:12]}, not the expected {digest[:12]}"
            raise OpdError(Reason.TEACHER_CHANGED, message, digest=info.digest)
        return info

    async def tokenizer(self, info: TeacherInfo) -> TextTokenizer:
        """The tokenizer of a teacher that is meant. Raises TEACHER_NOT_LOADED."""
        resident = self._loader.resident
        if resident and resident.info.tokenizer_digest == info.tokenizer_digest:
            return resident.tokenizer
        return await asyncio.get_running_loop().run_in_executor(self._files, self._known.tokenizer, info)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        teacher: TeacherInfo | None = None,
        client: str = "",
        use_cache: bool = True,
        apart: bool = False,
        deadline: float | None = None,
    ) -> AsyncGenerator[tuple[int, CachedScores], None]:
        """Score sequences; yields (index into `requests`, scores) as they are ready.

        `teacher` is who is asked (see `meant`), `client` shares the teacher fairly, `apart` computes nobody else's
        sequences beside these, so that their last bits depend on this call alone, `deadline` is in `time.monotonic`
        seconds. `milliseconds` is what computing took, now or, if cached, once. Closing the iterator frees the work.
        Raises INVALID_REQUEST, TEACHER_NOT_LOADED, TEACHER_LOADING or HIDDEN_NOT_SUPPORTED at once; QUEUE_FULL, and
        TEACHER_NOT_LOADED or TEACHER_CHANGED for a teacher that is not in memory and not all of whose answers are
        in the cache, before anything is computed; OUT_OF_MEMORY, NOT_A_NUMBER, DEADLINE_EXCEEDED, TEACHER_CHANGED or
        SHUTTING_DOWN later.
        """
        info = teacher or self._ready().info
        check_scores(requests, info)
        call = Call(self._desk, info, partial(self._absent, info), client, use_cache=use_cache, apart=apart)
        return scores(call, requests, deadline=deadline)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        teacher: TeacherInfo | None = None,
        client: str = "",
        use_cache: bool = True,
    ) -> AsyncGenerator[tuple[int, GeneratedToken], None]:
        """Continue prompts, many at once; yields (index into `requests`, token) as tokens come.

        Greedy and seeded completions are cached, and a cached one comes at once. Closing the iterator frees the
        work. Raises as `score` does.
        """
        info = teacher or self._ready().info
        check_generations(requests, info)
        call = Call(self._desk, info, partial(self._absent, info), client, use_cache=use_cache)
        return completions(call, requests)

    async def speculate(self, job: Speculation) -> AsyncGenerator[SpeculativeToken | Speculated, None]:
        """Answer prompts with a draft model's help, alone on the engine; every token, then what was measured.

        Closing the iterator ends the work. Raises as `speculative.speculate`, and TEACHER_NOT_LOADED.
        """
        info = self._ready().info
        mailbox: Mailbox[SpeculativeToken | Future[Speculated]] = Mailbox()
        cancelled = threading.Event()
        work = self._engine.ask(lambda loaded: speculate(loaded, info.eos_token_ids, job, mailbox.post, cancelled))
        work.add_done_callback(mailbox.post)
        try:
            while not isinstance(item := await mailbox.get(), Future):
                yield item
            yield item.result()
        finally:
            cancelled.set()
            work.cancel()

    async def reset_peak_memory(self) -> None:
        """Begin a new peak of memory."""
        await asyncio.wrap_future(self._engine.submit(mx.reset_peak_memory))

    async def peak_memory(self) -> int:
        """Most bytes held by MLX since `reset_peak_memory`."""
        return await asyncio.wrap_future(self._engine.submit(mx.get_peak_memory))

    async def head(self) -> TeacherHead:
        """The teacher's output head. Raises TEACHER_NOT_LOADED, HIDDEN_NOT_SUPPORTED."""
        info = self._ready().info
        if not info.supports_hidden:
            raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, info.hidden_refusal, teacher=info.name)
        return await asyncio.wrap_future(self._engine.ask(lambda loaded: export_head(loaded.parts)))

    def cache_stats(self) -> CacheStats:
        """Look-ups since the daemon started, and what is on disk."""
        return self._cache.stats()

    async def prune_cache(self, max_bytes: int | None) -> CacheStats:
        """Remove least recently used entries down to `max_bytes`: 0 means all, None down to the configured limit."""
        limit = self._cache.stats().limit_bytes if max_bytes is None else max_bytes
        await asyncio.to_thread(self._cache.prune, limit)
        return self._cache.stats()

    def _ready(self) -> Resident:
        if self._loader.resident:
            return self._loader.resident
        self._refuse_while_loading()
        raise (self._loader.failure or not_loaded()).with_traceback(None)

    def _absent(self, info: TeacherInfo, missing: int, total: int) -> OpdError:
        """Why a call for a teacher that isn't in memory can't be answered."""
        lacking = f"{missing} of {total} sequences are not in the cache"
        if self.info and self.info.digest != info.digest:
            reason = Reason.TEACHER_CHANGED
            message = f"the teacher in memory is {self.info.name}, not the expected {info.name}, and {lacking}"
        elif self._busy():
            reason, message = Reason.TEACHER_LOADING, f"a teacher is being loaded, and {lacking}; try again later"
        else:
            reason = Reason.TEACHER_NOT_LOADED
            message = f"{info.name} is not in memory, and {lacking}; load it with 'opd teacher load MODEL'"
        return OpdError(reason, message, digest=info.digest, missing=missing, total=total)

    def _busy(self) -> bool:
        return self._loading is not None and not self._loading.done()

    def _refuse_while_loading(self) -> None:
        if self._busy():
            raise OpdError(Reason.TEACHER_LOADING, "a teacher is being loaded; try again when it is ready")


def _check_tokenizer(info: TeacherInfo, expected: str) -> None:
    if expected and expected != info.tokenizer_digest:
        message = f"the tokenizer is {info.tokenizer_digest[:12]}, not the expected {expected[:12]}"
        raise OpdError(Reason.TOKENIZER_MISMATCH, message, digest=info.tokenizer_digest)
