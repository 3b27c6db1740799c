"""Loading: progress, every way a folder can be wrong, and a daemon that stays up."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import TeacherService
from opd_daemon.types import ScoreRequest, ScoreWants, TeacherState
from tests.teacher.resident import Home, load_model, random_ids, score_all

PHASES = ["checking", "hashing", "loading", "warming", "ready"]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def remove_key(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def name_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_tensor(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.norm.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


FAULTS: dict[str, tuple[Callable[[Path], object], Reason, str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), Reason.MODEL_NOT_FOUND, "not a model folder"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), Reason.TEACHER_LOAD_FAILED, "not valid JSON"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), Reason.TEACHER_LOAD_FAILED, "no model*.safetensors"),
    "missing shard": (
        name_missing_shard,
        Reason.TEACHER_LOAD_FAILED,
        "1 of 2 weight files are missing, first model-00002-of-00002.safetensors",
    ),
    "cut shard": (cut_shard, Reason.TEACHER_LOAD_FAILED, "cut off"),
    "shard is text": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs"),
        Reason.TEACHER_LOAD_FAILED,
        "not a safetensors file",
    ),
    "lost tensor": (lose_tensor, Reason.TEACHER_LOAD_FAILED, "model.norm.weight"),
    "wrong size": (lambda m: edit_config(m, hidden_size=32), Reason.TEACHER_LOAD_FAILED, "don't fit config.json"),
    "missing setting": (lambda m: remove_key(m, "hidden_size"), Reason.TEACHER_LOAD_FAILED, "hidden_size"),
    "unknown type": (lambda m: edit_config(m, model_type="qwen9"), Reason.TEACHER_LOAD_FAILED, "'qwen9'"),
    "own code": (lambda m: edit_config(m, model_file="evil.py"), Reason.TEACHER_LOAD_FAILED, "own code (evil.py)"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), Reason.MODEL_NOT_FOUND, "no tokenizer"),
}


def test_progress_goes_through_all_phases_and_the_facts_are_known(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        assert service.state is TeacherState.UNLOADED
        reports = await load_model(service, tiny_teacher)
        assert list(dict.fromkeys(report.phase for report in reports)) == PHASES
        fractions = [report.fraction for report in reports if report.phase == "loading"]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        info = service.info
        assert service.state is TeacherState.READY
        assert (info.architecture, info.dtype, info.hidden_size, info.max_context) == ("qwen2", "float32", 64, 512)
        assert info.vocab_size < info.padded_vocab_size
        assert info.supports_hidden
        assert len(info.eos_token_ids) == 2

    home.run(work)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_naming_the_cause_and_the_daemon_serves_on(
    home: Home, tiny_teacher: Path, tmp_path: Path, fault: str
) -> None:
    damage, reason, cause = FAULTS[fault]
    broken = shutil.copytree(tiny_teacher, tmp_path / "broken")
    damage(broken)

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError) as caught:
            await load_model(service, broken)
        assert caught.value.reason is reason
        assert cause in str(caught.value)
        assert "\n" not in str(caught.value)
        assert service.state is TeacherState.FAILED
        assert service.failure is caught.value
        with pytest.raises(OpdError) as refused:
            await score_all(service, [ScoreRequest(random_ids(4), 1)])
        assert refused.value is service.failure
        await load_model(service, tiny_teacher)
        assert service.failure is None
        await score_all(service, [ScoreRequest(random_ids(4), 1)])

    home.run(work)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-model"])
def test_an_unknown_path_is_not_found(home: Home, name: str) -> None:
    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError, match=name) as caught:
            await load_model(service, name)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND

    home.run(work)


def test_a_hub_id_without_a_connection_is_not_found(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError, match="some-org/some-model") as caught:
            await load_model(service, "some-org/some-model")
        assert caught.value.reason is Reason.MODEL_NOT_FOUND

    home.run(work)


def test_weights_that_cannot_fit_are_refused_before_loading(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)

    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError, match="GiB") as caught:
            await load_model(service, tiny_teacher)
        assert caught.value.reason is Reason.OUT_OF_MEMORY

    home.run(work)


def test_a_failed_check_leaves_the_present_teacher(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        with pytest.raises(OpdError):
            await load_model(service, "/nowhere")
        assert service.state is TeacherState.READY
        await score_all(service, [ScoreRequest(random_ids(4), 1)])

    home.run(work, tiny_teacher)


def test_loading_the_same_teacher_again_is_ready_at_once(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        reports = await load_model(service, tiny_teacher)
        assert "loading" not in [report.phase for report in reports]
        assert reports[-1].phase == "ready"

    home.run(work, tiny_teacher)


def test_another_teacher_takes_the_place_and_waiting_work_is_told(
    home: Home, tiny_teacher: Path, tiny_student: Path
) -> None:
    async def work(service: TeacherService) -> None:
        first = service.info.digest
        waiting = asyncio.ensure_future(score_all(service, many_requests(), use_cache=False))
        await asyncio.sleep(0.05)
        await load_model(service, tiny_student)
        with pytest.raises(OpdError) as caught:
            await waiting
        assert caught.value.reason is Reason.TEACHER_CHANGED
        assert service.info.digest != first
        await score_all(service, [ScoreRequest(random_ids(4), 1)])

    home.run(work, tiny_teacher, token_budget=500)


def many_requests() -> list[ScoreRequest]:
    return [ScoreRequest(random_ids(400, seed), 1, ScoreWants(top_k=64)) for seed in range(200)]


def test_two_loads_at_once_are_one_too_many(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        first = service.load(str(tiny_teacher))
        await anext(first)
        assert service.state is TeacherState.LOADING
        with pytest.raises(OpdError) as caught:
            await load_model(service, tiny_teacher)
        assert caught.value.reason is Reason.TEACHER_LOADING
        with pytest.raises(OpdError) as refused:
            service.score([ScoreRequest(random_ids(4), 1)])
        assert refused.value.reason is Reason.TEACHER_LOADING
        assert [report.phase async for report in first][-1] == "ready"

    home.run(work)


def test_who_loads_is_told_when_mlx_can_not_be_imported(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(service: TeacherService) -> None:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "opd_daemon.teacher.workroom", None)
            with pytest.raises(OpdError, match="the engine can't be started") as failure:
                await load_model(service, tiny_teacher)
            assert failure.value.reason is Reason.TEACHER_LOAD_FAILED
            assert (service.state, service.failure) == (TeacherState.FAILED, failure.value)
        await load_model(service, tiny_teacher)
        assert (service.state, service.failure) == (TeacherState.READY, None)

    home.run(work)


def test_nothing_is_loaded_once_the_daemon_goes(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        await service.close()
        with pytest.raises(OpdError) as failure:
            await load_model(service, tiny_teacher)
        assert failure.value.reason is Reason.SHUTTING_DOWN

    home.run(work)


def test_unloading_frees_the_memory(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        loaded = mx.get_active_memory()
        await service.unload()
        assert service.state is TeacherState.UNLOADED
        assert service.info is None
        assert mx.get_active_memory() < loaded
        with pytest.raises(OpdError) as caught:
            service.score([ScoreRequest(random_ids(4), 1)])
        assert caught.value.reason is Reason.TEACHER_NOT_LOADED
        await service.unload()

    home.run(work, tiny_teacher)


def test_the_digest_follows_the_content_and_is_remembered(home: Home, tiny_teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "other-name")

    async def digest(service: TeacherService) -> str:
        return service.info.digest

    original = home.run(digest, tiny_teacher)
    assert home.run(digest, copy) == original
    assert len(json.loads(home.memo.read_text())) == 4
    weights = dict(mx.load(str(copy / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    assert home.run(digest, copy) != original


def test_the_limit_of_open_files_is_left_alone(home: Home, tiny_teacher: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def work(service: TeacherService) -> None:
        assert np.all(resource.getrlimit(resource.RLIMIT_NOFILE) == np.array(before))

    home.run(work, tiny_teacher)


def test_text_and_chats_become_ids_and_text_again(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> None:
        tokenizer = await service.tokenizer(service.loaded())
        assert tokenizer.decode(tokenizer.encode("The sky is blue.")) == "The sky is blue."
        chat = [{"role": "user", "content": "Hello"}]
        opened = tokenizer.decode(tokenizer.render_chat(chat, True))
        assert opened == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokenizer.render_chat(chat, False)) == "<|im_start|>user\nHello<|im_end|>\n"

    home.run(work, tiny_teacher)
