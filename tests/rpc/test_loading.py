"""A teacher that is loaded: known by any of its paths, and everybody hears how the load ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from opd_daemon import failpoints
from opd_daemon.errors import OpdError
from opd_daemon.events import EventLog
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.access import Caller, caller
from opd_daemon.rpc.assembly import ResidentTeacher
from opd_daemon.rpc.interceptor import Context
from opd_daemon.rpc.teacher_answers import MESSAGE_BYTES, _pieces
from opd_daemon.rpc.teacher_service import TeacherServicer
from opd_daemon.store import Store
from opd_daemon.v1 import teacher_pb2 as pb
from tests.asynchronous import asynchronous, until
from tests.teacher.resident import Home

CONTEXT = cast(Context, None)


@asynccontextmanager
async def resident(home: Home, model: Path | None = None) -> AsyncIterator[tuple[ResidentTeacher, EventLog]]:
    events = EventLog(Store(home.memo.with_name("opd.db")))
    try:
        async with home.teacher(model) as service:
            yield ResidentTeacher(service, events), events
    finally:
        await events.aclose()


async def nobody() -> list[str]:
    return []


async def told(events: EventLog) -> list[str]:
    found, _ = await events.read(lambda store: store.events_after(0))
    return [event.payload["name"] for event in found if event.payload["state"] == "READY"]


@asynchronous
async def test_a_load_whose_caller_left_is_announced_when_it_ends(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    caller.set(Caller())
    async with resident(Home(tmp_path)) as (teacher, events):
        service = TeacherServicer(teacher, nobody, AllowedRoots.of([tiny_teacher, tiny_student]))
        names = []
        for model in (tiny_teacher, tiny_student):
            loading = service.LoadTeacher(pb.LoadTeacherRequest(model_path=str(model)), CONTEXT)
            await anext(loading)
            await loading.aclose()
            names.append(model.name)

            async def ready() -> bool:
                return await told(events) == names

            await until(ready)


@asynchronous
async def test_what_a_full_disk_kept_from_being_announced_is_announced_later(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.rpc.assembly.ANNOUNCE_SECONDS", 0.05)
    async with resident(Home(tmp_path)) as (teacher, events):
        failpoints.arm({"OPD_FAILPOINTS": "store.commit.before=error:ENOSPC@1+", "OPD_TEST_HARNESS": "1"})
        try:
            with pytest.raises(OpdError, match="no space left"):
                await teacher.ensure(str(tiny_teacher))
            assert await told(events) == []
        finally:
            failpoints.arm({})

        async def ready() -> bool:
            return await told(events) == [tiny_teacher.name]

        await until(ready)
        await teacher.announce()
        assert await ready()


@asynchronous
async def test_a_teacher_is_known_by_any_of_its_paths(tmp_path: Path, tiny_teacher: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_teacher)
    async with resident(Home(tmp_path), tiny_teacher) as (teacher, _):
        assert teacher.holds(str(tiny_teacher))
        assert teacher.holds(str(link))
        assert not teacher.holds(str(tmp_path))
        assert not teacher.holds("some/model")
        await teacher.ensure(str(link))


def test_many_prompts_come_back_in_messages_that_clients_take() -> None:
    prompts = [pb.TokenIds(ids=bytes(MESSAGE_BYTES // 3)) for _ in range(7)]
    pieces = list(_pieces(prompts))
    assert [prompt for piece in pieces for prompt in piece] == prompts
    assert max(sum(prompt.ByteSize() for prompt in piece) for piece in pieces) <= MESSAGE_BYTES
    assert list(_pieces([])) == [[]]
