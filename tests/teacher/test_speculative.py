"""Speculative decoding: the draft model changes the speed, never the words."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import TeacherService
from opd_daemon.teacher.speculative import Speculated, Speculation, SpeculativeToken
from opd_daemon.types import GenerateRequest, ScoreRequest
from tests.teacher.resident import Home, generate_all, random_ids, score_all
from tests.tiny import write_tiny_adapter, write_tiny_qwen2

PROMPTS = tuple(tuple(int(index) for index in random_ids(size, size)) for size in (3, 17, 40, 1))
LENGTH = 14


def job(base: Path, folder: Path, **changes: object) -> Speculation:
    adapter = write_tiny_adapter(folder / "adapter", base, size=0.0)
    values = {"base": base, "adapter": adapter, "prompts": PROMPTS, "max_tokens": LENGTH}
    return Speculation(**{**values, **changes})  # type: ignore[arg-type]


async def answers(service: TeacherService, asked: Speculation) -> tuple[list[list[SpeculativeToken]], Speculated]:
    found: list[list[SpeculativeToken]] = [[] for _ in asked.prompts]
    async with aclosing(service.speculate(asked)) as items:
        async for item in items:
            if isinstance(item, Speculated):
                return found, item
            found[item.prompt_index].append(item)
    raise AssertionError("it ended without a measurement")


def ids(tokens: Sequence[SpeculativeToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize(
    "draft",
    [{"seed": 2}, {"seed": 2, "vocab": 1024}, {"seed": 2, "vocab": 403}, {"seed": 2, "extra_tokens": ("<a>", "<b>")}],
    ids=["another model", "wider logits", "narrower logits", "more tokens"],
)
def test_the_answers_are_those_of_the_teacher_alone(
    home: Home, tiny_teacher: Path, tmp_path: Path, draft: dict[str, object]
) -> None:
    base = write_tiny_qwen2(tmp_path / "draft", **draft)  # type: ignore[arg-type]

    async def work(service: TeacherService) -> None:
        plain = await generate_all(service, [GenerateRequest(prompt, LENGTH, 0.0) for prompt in PROMPTS])
        found, measured = await answers(service, job(base, tmp_path))
        for tokens, alone in zip(found, plain, strict=True):
            assert ids(tokens) == [token.token_id for token in alone]
            assert [token.finish_reason for token in tokens] == [token.finish_reason for token in alone]
        assert measured.tokens == sum(map(len, found))
        assert 0 <= measured.accepted < measured.drafted
        assert measured.seconds > 0
        assert measured.draft_bytes > measured.adapter_bytes > 0
        # The engine serves on as before.
        await score_all(service, [ScoreRequest(random_ids(9), 1)])

    home.run(work, tiny_teacher)


def test_ids_that_only_the_teacher_has_are_no_trouble_for_the_draft(home: Home, tmp_path: Path) -> None:
    extra = tuple(f"<{number}>" for number in range(200))
    teacher = write_tiny_qwen2(tmp_path / "teacher", seed=1, extra_tokens=extra)
    draft = write_tiny_qwen2(tmp_path / "draft", seed=2, vocab=403)
    prompts = ((500, 2, 600), (4, 5))

    async def work(service: TeacherService) -> None:
        plain = await generate_all(service, [GenerateRequest(prompt, 40, 0.0) for prompt in prompts])
        found, _ = await answers(service, job(draft, tmp_path, prompts=prompts, max_tokens=40))
        assert [ids(tokens) for tokens in found] == [[token.token_id for token in alone] for alone in plain]
        assert any(token > 403 for tokens in found for token in ids(tokens))

    home.run(work, teacher)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_ids_are_never_said(home: Home, tmp_path: Path, temperature: float) -> None:
    teacher = write_tiny_qwen2(tmp_path / "teacher", seed=1, extra_tokens=tuple(f"<{number}>" for number in range(200)))
    draft = write_tiny_qwen2(tmp_path / "draft", seed=2)
    prompts = ((500, 2, 600), (4, 5))

    async def work(service: TeacherService) -> None:
        assert service.info
        size = service.info.vocab_size
        masked = tuple(range(size - 200, size))
        asked = [GenerateRequest(prompt, 40, 0.0, masked_token_ids=masked) for prompt in prompts]
        changes = {"prompts": prompts, "max_tokens": 40, "temperature": temperature, "masked_token_ids": masked}
        found, _ = await answers(service, job(draft, tmp_path, **changes))
        assert all(token < size - 200 for tokens in found for token in ids(tokens))
        if not temperature:
            plain = await generate_all(service, asked)
            assert [ids(tokens) for tokens in found] == [[token.token_id for token in alone] for alone in plain]

    home.run(work, teacher)


def test_a_draft_that_is_the_teacher_is_always_right(home: Home, tiny_teacher: Path, tmp_path: Path) -> None:
    async def work(service: TeacherService) -> None:
        _, measured = await answers(service, job(tiny_teacher, tmp_path))
        assert measured.accepted >= 0.7 * measured.drafted  # drafts behind an EOS are drafted in vain
        _, limited = await answers(service, job(tiny_teacher, tmp_path, prompts=PROMPTS[:1], max_tokens=1))
        assert (limited.tokens, limited.drafted, limited.accepted) == (1, 1, 1)

    home.run(work, tiny_teacher)


def test_the_same_seed_draws_the_same_answer(
    home: Home, tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    async def work(service: TeacherService) -> None:
        asked = [job(tiny_student, tmp_path, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        first, again, other = [[ids(tokens) for tokens in (await answers(service, each))[0]] for each in asked]
        assert first == again != other

    home.run(work, tiny_teacher)


def test_who_leaves_ends_the_work(home: Home, tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    async def work(service: TeacherService) -> None:
        asked = job(tiny_student, tmp_path, max_tokens=450)
        async with aclosing(service.speculate(asked)) as items:
            assert isinstance(await anext(items), SpeculativeToken)
        await score_all(service, [ScoreRequest(random_ids(9), 1)])

    home.run(work, tiny_teacher)


def test_a_draft_without_room_or_with_damage_is_refused_and_the_teacher_stays(
    home: Home, tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(service: TeacherService) -> None:
        asked = job(tiny_student, tmp_path)
        other = write_tiny_adapter(tmp_path / "other", tiny_teacher, size=0.0)
        with pytest.raises(OpdError) as damaged:
            await answers(service, Speculation(tiny_student, other, PROMPTS, 4))
        assert damaged.value.reason is Reason.TEACHER_LOAD_FAILED
        with monkeypatch.context() as patch:
            patch.setattr("opd_daemon.teacher.memory.WORKING_BYTES", 1 << 60)
            with pytest.raises(OpdError) as full:
                await answers(service, asked)
        assert full.value.reason is Reason.OUT_OF_MEMORY
        assert (await answers(service, asked))[1].tokens > 0

    home.run(work, tiny_teacher)
