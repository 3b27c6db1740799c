"""A teacher that is not in memory: what the cache holds is answered, what it lacks is refused with a count."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import TeacherService
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants, TeacherInfo
from tests.teacher.resident import Home, generate_all, load_model, random_ids, score_all

WANTS = ScoreWants(top_k=4, hidden=True)
KNOWN = [ScoreRequest(random_ids(12, seed), 3, WANTS) for seed in range(3)]
NEW = ScoreRequest(random_ids(12, 9), 3, WANTS)
PROMPT = GenerateRequest((5, 6, 7), 5, temperature=0.0)


def prepared(home: Home, model: Path) -> TeacherInfo:
    """A teacher that has answered `KNOWN` and `PROMPT`, and whose daemon has ended."""

    async def work(service: TeacherService) -> TeacherInfo:
        await score_all(service, KNOWN)
        await generate_all(service, [PROMPT])
        return service.loaded()

    return home.run(work, model)


def test_a_teacher_is_known_after_a_restart_and_its_cache_answers(home: Home, tiny_teacher: Path) -> None:
    info = prepared(home, tiny_teacher)

    async def work(service: TeacherService) -> None:
        meant = service.meant(info.digest, info.tokenizer_digest)
        assert meant == info
        assert service.info is None
        results = await score_all(service, KNOWN, teacher=meant)
        assert all(result.cached for result in results)
        (tokens,) = await generate_all(service, [PROMPT], teacher=meant)
        assert [token.cached for token in tokens] == [True] * 5
        tokenizer = await service.tokenizer(meant)
        assert tokenizer.decode(tokenizer.encode("water")) == "water"

    home.run(work)


def test_what_the_cache_lacks_is_counted_and_nothing_is_answered(home: Home, tiny_teacher: Path) -> None:
    info = prepared(home, tiny_teacher)

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError, match="1 of 4 sequences are not in the cache") as caught:
            await anext(service.score([*KNOWN, NEW], teacher=service.meant(info.digest)))
        assert caught.value.reason is Reason.TEACHER_NOT_LOADED
        assert caught.value.metadata["missing"] == "1"
        with pytest.raises(OpdError, match="3 of 3"):
            await anext(service.score(KNOWN, teacher=service.meant(info.digest), use_cache=False))
        with pytest.raises(OpdError, match="1 of 1") as refused:
            await anext(service.generate([GenerateRequest((1,), 3)], teacher=service.meant(info.digest)))
        assert refused.value.reason is Reason.TEACHER_NOT_LOADED

    home.run(work)


def test_unloading_leaves_the_cache_answering(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        info = service.loaded()
        await score_all(service, KNOWN)
        await service.unload()
        assert all(result.cached for result in await score_all(service, KNOWN, teacher=service.meant(info.digest)))

    home.run(work, tiny_teacher)


def test_requests_are_checked_against_the_absent_teacher(home: Home, tiny_teacher: Path) -> None:
    info = prepared(home, tiny_teacher)

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            service.score([ScoreRequest(np.array([1, 403], np.int32), 1)], teacher=service.meant(info.digest))
        assert caught.value.reason is Reason.INVALID_REQUEST
        with pytest.raises(OpdError) as differing:
            service.meant(info.digest, "0" * 64)
        assert differing.value.reason is Reason.TOKENIZER_MISMATCH

    home.run(work)


def test_a_teacher_never_seen_here_is_not_answered_for(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            service.meant("0" * 64)
        assert caught.value.reason is Reason.TEACHER_NOT_LOADED
        await load_model(service, tiny_teacher)
        with pytest.raises(OpdError) as changed:
            service.meant("0" * 64)
        assert changed.value.reason is Reason.TEACHER_CHANGED

    home.run(work)


def test_another_teacher_in_memory_answers_for_itself_only(home: Home, tiny_teacher: Path, tiny_student: Path) -> None:
    info = prepared(home, tiny_teacher)

    async def work(service: TeacherService) -> None:
        meant = service.meant(info.digest)
        assert all(result.cached for result in await score_all(service, KNOWN, teacher=meant))
        with pytest.raises(OpdError, match="1 of 4") as caught:
            await score_all(service, [*KNOWN, NEW], teacher=meant)
        assert caught.value.reason is Reason.TEACHER_CHANGED
        with pytest.raises(OpdError) as changed:
            service.loaded(info.digest)
        assert changed.value.reason is Reason.TEACHER_CHANGED

    home.run(work, tiny_student)


def test_a_damaged_entry_is_no_answer(home: Home, tiny_teacher: Path) -> None:
    info = prepared(home, tiny_teacher)
    for entry in home.entries():
        entry.write_bytes(entry.read_bytes()[:-1])

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            await score_all(service, KNOWN, teacher=service.meant(info.digest))
        assert caught.value.reason is Reason.TEACHER_NOT_LOADED

    home.run(work)


def test_text_needs_the_tokenizer_to_be_where_it_was(home: Home, tiny_teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "moved")
    info = prepared(home, copy)
    shutil.rmtree(copy)

    async def work(service: TeacherService) -> None:
        meant = service.meant(info.digest)
        assert len(await score_all(service, KNOWN, teacher=meant)) == 3
        with pytest.raises(OpdError, match="no longer where it was") as caught:
            await service.tokenizer(meant)
        assert caught.value.reason is Reason.TEACHER_NOT_LOADED

    home.run(work)


def test_a_memo_that_cannot_be_read_only_costs_the_memory(home: Home, tiny_teacher: Path) -> None:
    info = prepared(home, tiny_teacher)
    (home.memo.parent / "teachers.json").write_text('{"' + info.digest + '": {"name": "old"}}')

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError):
            service.meant(info.digest)
        await load_model(service, tiny_teacher)
        await service.unload()
        assert service.meant(info.digest) == info

    home.run(work)
