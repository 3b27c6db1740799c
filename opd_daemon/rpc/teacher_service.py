"""TeacherService: the teacher comes and goes; what it is asked, `teacher_answers` carries onto the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING

from opd_daemon.errors import OpdError, Reason, invalid
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.access import caller
from opd_daemon.rpc.assembly import ResidentTeacher
from opd_daemon.rpc.interceptor import Context
from opd_daemon.teacher.folder import is_hub_id
from opd_daemon.v1 import teacher_pb2 as pb
from opd_daemon.v1 import teacher_pb2_grpc as rpc
from opd_daemon.wire import teacher as wire

if TYPE_CHECKING:
    from opd_daemon.rpc.teacher_answers import Answers


class TeacherServicer(rpc.TeacherServiceServicer):
    """Thin layer over `teacher.service.TeacherService`; `users` names the live runs that need the present teacher."""

    def __init__(
        self, resident: ResidentTeacher, users: Callable[[], Awaitable[list[str]]], roots: AllowedRoots
    ) -> None:
        self._resident = resident
        self._teacher = resident.service
        self._users = users
        self._roots = roots

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Context) -> pb.GetTeacherResponse:
        return pb.GetTeacherResponse(teacher=self._description())

    async def LoadTeacher(
        self, request: pb.LoadTeacherRequest, context: Context
    ) -> AsyncIterator[pb.LoadTeacherResponse]:
        if not request.model_path:
            raise invalid("model_path", "empty: name a model folder")
        await asyncio.to_thread(self._check_path, request.model_path)
        if not self._resident.holds(request.model_path):
            await self._require_unused(request.force)
        try:
            async with aclosing(self._teacher.load(request.model_path)) as reports:
                async for progress in reports:
                    response = wire.progress_to_proto(progress)
                    if progress.phase == "ready":
                        response.teacher.CopyFrom(self._description())
                    yield response
        finally:
            await self._resident.announce()

    async def UnloadTeacher(self, request: pb.UnloadTeacherRequest, context: Context) -> pb.UnloadTeacherResponse:
        worker_of = caller.get().run_id
        # A worker may do without the teacher, but not take it from other runs.
        await self._require_unused(request.force and not worker_of, besides=worker_of)
        await self._teacher.unload()
        await self._resident.announce(f"unloaded by run {worker_of}" if worker_of else "unloaded on request")
        return pb.UnloadTeacherResponse()

    def ComputeLogprobs(
        self, request: pb.ComputeLogprobsRequest, context: Context
    ) -> AsyncIterator[pb.ComputeLogprobsResponse]:
        return self._answers.compute_logprobs(request, context)

    def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        return self._answers.generate(request, context)

    def GetHead(self, request: pb.GetHeadRequest, context: Context) -> AsyncIterator[pb.GetHeadResponse]:
        return self._answers.head(request)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return await self._answers.tokenize(request)

    async def GetCacheStats(self, request: pb.GetCacheStatsRequest, context: Context) -> pb.GetCacheStatsResponse:
        return pb.GetCacheStatsResponse(stats=wire.cache_stats_to_proto(self._teacher.cache_stats()))

    async def PruneCache(self, request: pb.PruneCacheRequest, context: Context) -> pb.PruneCacheResponse:
        limit = request.max_bytes if request.HasField("max_bytes") else None
        if limit is not None and limit < 0:
            raise invalid("max_bytes", f"{limit} is negative; use 0 to empty the cache")
        return pb.PruneCacheResponse(stats=wire.cache_stats_to_proto(await self._teacher.prune_cache(limit)))

    @cached_property
    def _answers(self) -> Answers:
        from opd_daemon.rpc.teacher_answers import Answers  # with numpy, which nothing else here needs

        return Answers(self._teacher)

    def _description(self) -> pb.Teacher:
        failure = self._teacher.failure
        return wire.teacher_to_proto(self._teacher.state, self._teacher.info, str(failure) if failure else "")

    def _check_path(self, model: str) -> None:
        if not is_hub_id(model):
            self._roots.require("model_path", model, "folder")

    async def _require_unused(self, force: bool, besides: str = "") -> None:
        users = [run_id for run_id in await self._users() if run_id != besides]
        if users and not force:
            message = f"the teacher is in use by run {users[0]}; stop it first, or force"
            raise OpdError(Reason.TEACHER_IN_USE, message, run_id=users[0])
