"""Who may unload the teacher: clients when no run uses it, a run's own worker when no other run does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.events import EventLog
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.access import Caller, Gate, caller
from opd_daemon.rpc.assembly import ResidentTeacher
from opd_daemon.rpc.interceptor import Context
from opd_daemon.rpc.teacher_service import TeacherServicer
from opd_daemon.store import Store
from opd_daemon.types import TeacherState
from opd_daemon.v1 import teacher_pb2 as pb
from tests.asynchronous import asynchronous
from tests.teacher.resident import Home

CONTEXT = cast(Context, None)


@asynccontextmanager
async def servicer(home: Home, model: Path, users: list[str]) -> AsyncIterator[TeacherServicer]:
    events = EventLog(Store(home.memo.with_name("opd.db")))

    async def live() -> list[str]:
        return users

    try:
        async with home.teacher(model) as service:
            yield TeacherServicer(ResidentTeacher(service, events), live, AllowedRoots.of([model]))
    finally:
        await events.aclose()


async def state(service: TeacherServicer) -> TeacherState:
    answer = await service.GetTeacher(pb.GetTeacherRequest(), CONTEXT)
    return TeacherState(pb.TeacherState.Name(answer.teacher.state).removeprefix("TEACHER_STATE_"))


@asynchronous
async def test_a_worker_may_unload_the_teacher_only_its_run_uses(tmp_path: Path, tiny_teacher: Path) -> None:
    caller.set(Caller("run-1"))
    async with servicer(Home(tmp_path), tiny_teacher, ["run-1"]) as service:
        await service.UnloadTeacher(pb.UnloadTeacherRequest(), CONTEXT)
        assert await state(service) is TeacherState.UNLOADED


@pytest.mark.parametrize("force", [False, True])
def test_a_worker_cannot_take_the_teacher_from_another_run(tmp_path: Path, tiny_teacher: Path, force: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        caller.set(Caller("run-1"))
        async with servicer(Home(tmp_path), tiny_teacher, ["run-1", "run-2"]) as service:
            with pytest.raises(OpdError, match="run-2") as caught:
                await service.UnloadTeacher(pb.UnloadTeacherRequest(force=force), CONTEXT)
            assert caught.value.reason is Reason.TEACHER_IN_USE
            assert await state(service) is TeacherState.READY

    scenario()


@asynchronous
async def test_a_client_unloads_what_a_run_uses_only_by_force(tmp_path: Path, tiny_teacher: Path) -> None:
    caller.set(Caller())
    async with servicer(Home(tmp_path), tiny_teacher, ["run-1"]) as service:
        with pytest.raises(OpdError) as caught:
            await service.UnloadTeacher(pb.UnloadTeacherRequest(), CONTEXT)
        assert caught.value.reason is Reason.TEACHER_IN_USE
        await service.UnloadTeacher(pb.UnloadTeacherRequest(force=True), CONTEXT)
        assert await state(service) is TeacherState.UNLOADED


def test_a_workers_token_opens_unload_but_not_load() -> None:
    gate = Gate("secret", {"worker": "run-1"}.get)
    method = "/opd_daemon.v1.TeacherService/"
    assert gate.admit(f"{method}UnloadTeacher", "Bearer worker") == Caller("run-1")
    with pytest.raises(OpdError) as caught:
        gate.admit(f"{method}LoadTeacher", "Bearer worker")
    assert caught.value.reason is Reason.OUT_OF_SCOPE
