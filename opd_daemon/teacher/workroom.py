"""Where the teacher works: the engine's thread, the loader of its model, and the desk where calls are served.

Everything of the teacher that needs MLX or numpy is reached through here, so that a daemon which has never had
anything to compute imports neither.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, Future

import mlx.core as mx

from opd_daemon.errors import OpdError
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.calls import Call, Desk, completions, scores
from opd_daemon.teacher.digest import DigestMemo
from opd_daemon.teacher.engine import Engine
from opd_daemon.teacher.export import export_head
from opd_daemon.teacher.known import KnownTeachers
from opd_daemon.teacher.loader import Loader
from opd_daemon.teacher.speculation import Speculated, Speculation, SpeculativeToken
from opd_daemon.teacher.speculative import speculate
from opd_daemon.teacher.tally import MemoryUse
from opd_daemon.teacher.validation import check_generations, check_scores
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import CachedScores, GeneratedToken, GenerateRequest, ScoreRequest, TeacherInfo

# Why a call for a teacher that isn't in memory can't be answered, given how many sequences are missing, of how many.
Absent = Callable[[int, int], OpdError]


class Workroom:
    """What `TeacherService` opens with the first call that computes or loads."""

    def __init__(
        self, engine: Engine, cache: TeacherCache, digests: DigestMemo, known: KnownTeachers, files: Executor
    ) -> None:
        self.engine = engine
        self.loader = Loader(engine, digests, known, files)
        self._desk = Desk(engine, cache, files)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        info: TeacherInfo,
        absent: Absent,
        *,
        client: str,
        use_cache: bool,
        apart: bool,
        deadline: float | None,
    ) -> AsyncGenerator[tuple[int, CachedScores], None]:
        """As `TeacherService.score`."""
        check_scores(requests, info)
        call = Call(self._desk, info, absent, client, use_cache=use_cache, apart=apart)
        return scores(call, requests, deadline=deadline)

    def generate(
        self, requests: Sequence[GenerateRequest], info: TeacherInfo, absent: Absent, *, client: str, use_cache: bool
    ) -> AsyncGenerator[tuple[int, GeneratedToken], None]:
        """As `TeacherService.generate`."""
        check_generations(requests, info)
        return completions(Call(self._desk, info, absent, client, use_cache=use_cache), requests)

    def speculate(
        self,
        job: Speculation,
        eos_token_ids: Sequence[int],
        deliver: Callable[[SpeculativeToken], None],
        cancelled: threading.Event,
    ) -> Future[Speculated]:
        """As `speculative.speculate`, on the engine's thread."""
        return self.engine.ask(lambda loaded: speculate(loaded, eos_token_ids, job, deliver, cancelled))

    def head(self) -> Future[TeacherHead]:
        """The output head of a model that has one of its own."""
        return self.engine.ask(lambda loaded: export_head(loaded.parts))

    def memory(self) -> MemoryUse:
        """What MLX's arrays take."""
        return MemoryUse(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())

    def reset_peak_memory(self) -> Future[None]:
        """Begin a new peak of memory."""
        return self.engine.submit(mx.reset_peak_memory)

    def peak_memory(self) -> Future[int]:
        """Most bytes held by MLX since `reset_peak_memory`."""
        return self.engine.submit(mx.get_peak_memory)
