"""The teacher as the rest of the daemon sees it: asyncio in front, the engine's thread and the disk behind."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.digest import DigestMemo
from opd_daemon.teacher.folder import load_failed
from opd_daemon.teacher.known import KnownTeachers
from opd_daemon.teacher.mailbox import Mailbox
from opd_daemon.teacher.refusals import not_loaded, shutting_down
from opd_daemon.teacher.speculation import Speculated, Speculation, SpeculativeToken
from opd_daemon.teacher.tally import MemoryUse, WorkTally
from opd_daemon.teacher.tokenizer import TextTokenizer
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

if TYPE_CHECKING:
    from opd_daemon.teacher.loader import Report, Resident
    from opd_daemon.teacher.workroom import Workroom

logger = logging.getLogger(__name__)

FILE_THREADS = 4
KNOWN_TEACHERS = "teachers.json"


class TeacherService:
    """Loads one teacher at a time and answers for it. Use from one event loop, between `start` and `close`.

    cache_dir, cache_limit_bytes: answers on disk. digest_memo: file with digests already computed; beside it are kept
    the facts of teachers that were loaded. token_budget: tokens of one forward pass. piece: positions between two
    chances to cancel or to take turns. max_queue_tokens: tokens that may wait.
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
    ) -> None:
        self._files = ThreadPoolExecutor(FILE_THREADS, "teacher-files")
        self._cache = TeacherCache(cache_dir, cache_limit_bytes)
        self._known = KnownTeachers(digest_memo.with_name(KNOWN_TEACHERS))
        self._digests = DigestMemo(digest_memo)
        self._limits = {
            "token_budget": token_budget,
            "piece": piece,
            "max_queue_tokens": max_queue_tokens,
        }
        self._room: Workroom | None = None
        self._opening = threading.Lock()
        self._closing = False
        self._unopened: OpdError | None = None
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Index the cache."""
        await asyncio.to_thread(self._cache.open)

    async def close(self) -> None:
        """Stop after the piece in progress and finish writing the cache. Waiting calls fail with SHUTTING_DOWN."""
        await asyncio.to_thread(self._close_room)
        await self.settled()
        await asyncio.to_thread(self._cache.close)
        await asyncio.to_thread(self._files.shutdown)

    @property
    def state(self) -> TeacherState:
        """UNLOADED, LOADING, READY (also while a load is still checking its files), or FAILED."""
        if self._resident:
            return TeacherState.READY
        if self.loading:
            return TeacherState.LOADING
        return TeacherState.FAILED if self.failure else TeacherState.UNLOADED

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return self._loading is not None and not self._loading.done()

    @property
    def info(self) -> TeacherInfo | None:
        """Facts of the teacher while READY."""
        return self._resident.info if self._resident else None

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the teacher."""
        return self._room.engine.queued_tokens if self._room else 0

    @property
    def work(self) -> WorkTally:
        """What the engine has done since the start."""
        return self._room.engine.work if self._room else WorkTally()

    def memory(self) -> MemoryUse:
        """What MLX's arrays take."""
        return self._room.memory() if self._room else MemoryUse()

    @property
    def failure(self) -> OpdError | None:
        """Why the last load failed, while FAILED."""
        return self._room.loader.failure if self._room else self._unopened

    async def load(self, path_or_hub_id: str) -> AsyncGenerator[LoadProgress, None]:
        """Load a teacher in place of the present one, reporting progress; the last report has the phase ready.

        A model that is loaded already is ready at once. A caller that stops listening doesn't stop the load. Raises
        TEACHER_LOADING, MODEL_NOT_FOUND, TEACHER_LOAD_FAILED or OUT_OF_MEMORY; if the fault shows before weights are
        read, the present teacher stays.
        """
        self._refuse_while_loading()
        mailbox: Mailbox[LoadProgress | OpdError] = Mailbox()
        self._loading = asyncio.create_task(self._load(path_or_hub_id, mailbox.post))
        phase = ""
        while phase != "ready":
            report = await mailbox.get()
            if isinstance(report, OpdError):
                raise report
            phase = report.phase
            yield report

    async def settled(self) -> None:
        """Return once no load is under way."""
        if self._loading:
            await asyncio.wait([self._loading])

    async def unload(self) -> None:
        """Free the teacher's memory; calls under way fail with TEACHER_CHANGED. Raises TEACHER_LOADING."""
        self._refuse_while_loading()
        self._unopened = None
        if self._room:
            await self._room.loader.unload()

    def meant(self, digest: str = "", tokenizer_digest: str = "") -> TeacherInfo:
        """The teacher a call is for: the one in memory, or one known by its digest, for which the cache answers.

        Empty digests mean whichever is in memory. Raises TEACHER_NOT_LOADED, TEACHER_LOADING, TEACHER_CHANGED or
        TOKENIZER_MISMATCH.
        """
        resident = self._room.engine.digest if self._room else ""
        known = self._known.find(digest) if digest and digest != resident else None
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
        if self._resident and self._resident.info.tokenizer_digest == info.tokenizer_digest:
            return self._resident.tokenizer
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
        absent = partial(self._absent, info)
        return self._open().score(
            requests, info, absent, client=client, use_cache=use_cache, apart=apart, deadline=deadline
        )

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
        absent = partial(self._absent, info)
        return self._open().generate(requests, info, absent, client=client, use_cache=use_cache)

    async def speculate(self, job: Speculation) -> AsyncGenerator[SpeculativeToken | Speculated, None]:
        """Answer prompts with a draft model's help, alone on the engine; every token, then what was measured.

        Closing the iterator ends the work. Raises as `speculative.speculate`, and TEACHER_NOT_LOADED.
        """
        info = self._ready().info
        mailbox: Mailbox[SpeculativeToken | Future[Speculated]] = Mailbox()
        cancelled = threading.Event()
        work = self._open().speculate(job, info.eos_token_ids, mailbox.post, cancelled)
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
        await asyncio.wrap_future(self._open().reset_peak_memory())

    async def peak_memory(self) -> int:
        """Most bytes held by MLX since `reset_peak_memory`."""
        return await asyncio.wrap_future(self._open().peak_memory())

    async def head(self) -> TeacherHead:
        """The teacher's output head. Raises TEACHER_NOT_LOADED, HIDDEN_NOT_SUPPORTED."""
        info = self._ready().info
        if not info.supports_hidden:
            raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, info.hidden_refusal, teacher=info.name)
        return await asyncio.wrap_future(self._open().head())

    def cache_stats(self) -> CacheStats:
        """Look-ups since the daemon started, and what is on disk."""
        return self._cache.stats()

    async def prune_cache(self, max_bytes: int | None) -> CacheStats:
        """Remove least recently used entries down to `max_bytes`: 0 means all, None down to the configured limit."""
        limit = self._cache.stats().limit_bytes if max_bytes is None else max_bytes
        await asyncio.to_thread(self._cache.prune, limit)
        return self._cache.stats()

    @property
    def _resident(self) -> Resident | None:
        return self._room.loader.resident if self._room else None

    def _open(self) -> Workroom:
        """What computes, on first use: importing MLX takes longer than everything else a daemon starts with.

        Raises:
            OpdError: SHUTTING_DOWN.
        """
        with self._opening:
            if self._room is None:
                from opd_daemon.teacher.engine import Engine
                from opd_daemon.teacher.workroom import Workroom

                if self._closing:
                    raise shutting_down()
                engine = Engine(**self._limits)
                engine.start()
                self._room = Workroom(engine, self._cache, self._digests, self._known, self._files)
            return self._room

    def _close_room(self) -> None:
        with self._opening:
            self._closing = True
        if self._room:
            self._room.engine.close()

    async def _load(self, model: str, report: Report) -> None:
        """Load, telling `report` every step; the last report is the phase ready, or the error."""
        try:
            room = await asyncio.to_thread(self._open)
        except Exception as error:  # noqa: BLE001 - whatever an installation of MLX lacks, who waits is told
            self._unopened = error if isinstance(error, OpdError) else _unopened(model, error)
            report(self._unopened)
        else:
            await room.loader.load(model, report)

    def _ready(self) -> Resident:
        if self._resident:
            return self._resident
        self._refuse_while_loading()
        raise (self.failure or not_loaded()).with_traceback(None)

    def _absent(self, info: TeacherInfo, missing: int, total: int) -> OpdError:
        """Why a call for a teacher that isn't in memory can't be answered."""
        lacking = f"{missing} of {total} sequences are not in the cache"
        if self.info and self.info.digest != info.digest:
            reason = Reason.TEACHER_CHANGED
            message = f"the teacher in memory is {self.info.name}, not the expected {info.name}, and {lacking}"
        elif self.loading:
            reason, message = Reason.TEACHER_LOADING, f"a teacher is being loaded, and {lacking}; try again later"
        else:
            reason = Reason.TEACHER_NOT_LOADED
            message = f"{info.name} is not in memory, and {lacking}; load it with 'opd teacher load MODEL'"
        return OpdError(reason, message, digest=info.digest, missing=missing, total=total)

    def _refuse_while_loading(self) -> None:
        if self.loading:
            raise OpdError(Reason.TEACHER_LOADING, "a teacher is being loaded; try again when it is ready")


def _unopened(model: str, error: Exception) -> OpdError:
    logger.error("the teacher's engine can't be started", exc_info=error)
    return load_failed(model, "the engine can't be started; the daemon's log says why, 'opd doctor' what MLX lacks")


def _check_tokenizer(info: TeacherInfo, expected: str) -> None:
    if expected and expected != info.tokenizer_digest:
        message = f"the tokenizer is {info.tokenizer_digest[:12]}, not the expected {expected[:12]}"
        raise OpdError(Reason.TOKENIZER_MISMATCH, message, digest=info.tokenizer_digest)
