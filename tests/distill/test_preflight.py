"""Everything that can be checked before a weight is loaded is, one violation per fault."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

from opd_daemon.config import LoraConfig, RunConfig, parse_config
from opd_daemon.distill.adapter import CONFIG, WEIGHTS
from opd_daemon.distill.preflight import check_run
from opd_daemon.distill.student import Student
from opd_daemon.paths import AllowedRoots
from opd_daemon.trainer import TrainerInfo
from tests.tiny import write_tiny_qwen2

ANYWHERE = AllowedRoots.of([Path("/")])


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    strength: float = 1.0


def given_completions(config: RunConfig, options: BaseModel) -> dict[str, float]:
    return {"student": 1.0} if config.use_teacher_targets else {"data": 1.0}


TRAINER = TrainerInfo(
    "t",
    "1",
    "",
    factory=lambda: None,  # type: ignore[arg-type,return-value]
    options=Options,
    on_policy=True,
    sources=given_completions,
    faults=lambda config, _: [("seed", "unlucky")] if config.seed == 13 else (),
)


@pytest.fixture
def settings(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(10)))
    return {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(rows),
        "max_generation_tokens": 16,
        "num_steps": 10,
    }


def faults(settings: dict[str, Any]) -> dict[str, str]:
    return {fault.field: fault.description for fault in check_run(parse_config(settings), TRAINER, ANYWHERE)}


def test_a_sound_run_has_no_faults(settings: dict[str, Any], tmp_path: Path) -> None:
    assert faults({**settings, "output_adapter_path": str(tmp_path / "new" / "folder")}) == {}


def test_every_fault_is_reported_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    found = faults(
        {
            **settings,
            "base_model_path": str(tmp_path / "nope"),
            "teacher_model_path": str(tmp_path),
            "prompts_path": str(tmp_path / "missing.jsonl"),
            "output_adapter_path": str(tmp_path / "rows.jsonl" / "inside"),
            "trainer_options": {"strenght": 2},
        }
    )
    assert found == {
        "config.base_model_path": f"{tmp_path}/nope: no such folder; give an mlx-lm model folder "
        "(config.json and model*.safetensors)",
        "config.teacher_model_path": f"{tmp_path}: not a model folder, it has no config.json; "
        "give an mlx-lm model folder (config.json and model*.safetensors)",
        "config.prompts_path": f"{tmp_path}/missing.jsonl: no such file",
        "config.output_adapter_path": f"{tmp_path}/rows.jsonl/inside: {tmp_path}/rows.jsonl is a file, not a folder; "
        "choose another",
        "config.trainer_options.strenght": "trainer t has no such option; it has strength",
    }


def test_faulty_lines_are_named_up_to_a_handful(settings: dict[str, Any]) -> None:
    path = Path(settings["prompts_path"])
    path.write_text("{broken\n" * 9)
    found = [fault.description for fault in check_run(parse_config(settings), TRAINER, ANYWHERE)]
    assert [f"{path}:{line}: not JSON" in text for line, text in enumerate(found[:5], start=1)] == [True] * 5
    assert found[5:] == [f"{path}: 4 more faulty lines"]


@pytest.fixture
def broken(settings: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the student that a test may break."""
    folder = tmp_path / "broken"
    shutil.copytree(settings["base_model_path"], folder)
    settings["base_model_path"] = str(folder)
    return folder


def break_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_weights, "cut off"),
        (break_header, "not a safetensors file, or cut off"),
        (lose_a_shard, "1 of 2 weight files are missing, first model-00002-of-00002.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model*.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no 'model_type'"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is broken"),
    ],
)
def test_damaged_model_folders_are_named(settings: dict[str, Any], broken: Path, damage: Any, says: str) -> None:
    damage(broken)
    found = faults(settings)
    assert list(found) == ["config.base_model_path"]
    assert says in found["config.base_model_path"]


def test_tokenizers_that_disagree_are_refused_by_their_first_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["teacher_model_path"] = str(write_tiny_qwen2(tmp_path / "other", shuffled_vocab=True))
    found = faults(settings)["config.teacher_model_path"]
    assert "disagrees with the student's" in found
    assert "id 0 is " in found


def test_padded_and_superset_vocabularies_are_no_fault(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_qwen2(tmp_path / "wide", vocab=1024, extra_tokens=["<think>", "</think>"])
    assert faults({**settings, "teacher_model_path": str(folder)}) == {}


def test_computing_ahead_needs_the_cache(settings: dict[str, Any]) -> None:
    offline = replace(TRAINER, sources=lambda _config, _options: {"teacher": 1.0})
    assert check_run(parse_config({**settings, "precompute": True}), offline, ANYWHERE) == []
    (fault,) = check_run(parse_config({**settings, "precompute": True, "use_cache": False}), offline, ANYWHERE)
    assert (fault.field, "use_cache true" in fault.description) == ("config.precompute", True)


def test_the_chat_template_counts_towards_a_prompts_length(settings: dict[str, Any]) -> None:
    rows = [json.loads(line)["prompt"] for line in Path(settings["prompts_path"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(settings["base_model_path"])
    bare = max(len(tokenizer.encode(text)) for text in rows)
    whole = max(
        len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        for text in rows
    )
    assert bare < whole
    assert faults({**settings, "max_prompt_tokens": whole}) == {}
    found = faults({**settings, "max_prompt_tokens": bare})["config.max_prompt_tokens"]
    assert f"tokens, more than max_prompt_tokens {bare}; shorten the prompt" in found


@pytest.mark.parametrize("name", ["base_model_path", "teacher_model_path"])
def test_no_length_is_measured_with_a_model_that_can_not_be_read(settings: dict[str, Any], name: str) -> None:
    """The system may not even take its path."""
    settings |= {"max_prompt_tokens": 2, "teacher_template": "teacher"}
    assert list(faults({**settings, name: 10_000 * "A"})) == [f"config.{name}"]


def write_rows(settings: dict[str, Any], *rows: dict[str, Any]) -> None:
    Path(settings["prompts_path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]


LONG = "one two three " * 20


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ({"teacher_prompt": LONG}, {}),
        ({"teacher_messages": chat(LONG)}, {}),
        ({}, {"teacher_system_prompt": LONG}),
    ],
)
def test_what_only_the_teacher_reads_counts_towards_a_prompts_length(
    settings: dict[str, Any], row: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_rows(settings, {"prompt": "Hi"}, {"prompt": "Hi", **row})
    assert faults({**settings, **changes}) == {}
    found = faults({**settings, **changes, "max_prompt_tokens": 64})
    assert list(found) == ["config.max_prompt_tokens"]
    assert "tokens as the teacher reads it, more than max_prompt_tokens 64" in found["config.max_prompt_tokens"]


def test_the_teachers_own_template_counts_where_it_is_used(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "verbose"
    shutil.copytree(settings["teacher_model_path"], folder)
    file = folder / "tokenizer_config.json"
    template = LONG + json.loads(file.read_text())["chat_template"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    settings |= {"teacher_model_path": str(folder), "max_prompt_tokens": 64}
    assert faults(settings) == {}
    found = faults({**settings, "teacher_template": "teacher"})
    assert "as the teacher reads it" in found["config.max_prompt_tokens"]


def test_a_prompt_that_leaves_no_room_to_answer_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    write_rows(settings, {"prompt": "Hi"}, {"prompt": LONG})
    assert faults({**settings, "max_generation_tokens": 100}) == {}
    found = faults({**settings, "max_generation_tokens": 450})
    assert list(found) == ["config.max_generation_tokens"]
    assert "rows.jsonl:2: " in found["config.max_generation_tokens"]
    assert "with max_generation_tokens 450 more than the context of 512" in found["config.max_generation_tokens"]
    # What only the teacher reads needs room in its context alone.
    write_rows(settings, {"prompt": "Hi"}, {"prompt": "Hi", "teacher_prompt": LONG})
    assert (
        "as the teacher reads it" in faults({**settings, "max_generation_tokens": 450})["config.max_generation_tokens"]
    )
    settings["teacher_model_path"] = str(write_tiny_qwen2(tmp_path / "wide", seed=1, context=1024))
    assert faults({**settings, "max_generation_tokens": 450}) == {}


def test_a_plain_text_has_no_place_for_the_teachers_system_prompt(settings: dict[str, Any]) -> None:
    write_rows(settings, {"prompt": "Hi"}, {"text": "Once upon a time."})
    assert "config.teacher_system_prompt" not in faults(settings)
    found = faults({**settings, "teacher_system_prompt": "You know all."})
    assert list(found) == ["config.prompts_path"]
    assert "rows.jsonl:2: a plain text has no chat" in found["config.prompts_path"]


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"top_k": 1000}, "top_k", "1000: the vocabulary has"),
        ({"max_generation_tokens": 512}, "max_generation_tokens", "no room for a prompt in the models' context of 512"),
        ({"max_prompt_tokens": 2}, "max_prompt_tokens", "rows.jsonl:1: "),
        ({"use_teacher_targets": False}, "prompts_path", "rows.jsonl:1: has no completion to learn"),
        ({"trainer_options": {"strength": "much"}}, "trainer_options.strength", "'much'"),
        ({"seed": 13}, "seed", "unlucky"),
        ({"precompute": True}, "precompute", "can't be scored beforehand"),
        ({"eval_tasks": "arc_easy"}, "eval_tasks", "pip install lm-eval"),
    ],
)
def test_values_that_cannot_work_are_named(
    settings: dict[str, Any], changes: dict[str, Any], field: str, says: str
) -> None:
    found = faults({**settings, **changes})
    assert list(found) == [f"config.{field}"]
    assert says in found[f"config.{field}"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_cannot_be_written_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    found = faults({**settings, "output_adapter_path": str(tmp_path / "closed" / "out")})
    assert "is not writable" in found["config.output_adapter_path"]


@pytest.fixture
def adapter(settings: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    Student.load(Path(settings["base_model_path"]), None, LoraConfig(rank=4), seed=0).save_adapter(folder)
    settings["student_adapter_path"] = str(folder)
    return folder


def test_an_adapter_is_checked_against_the_base(settings: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    assert faults(settings) == {}
    other = write_tiny_qwen2(tmp_path / "wider", hidden=96)
    found = faults({**settings, "base_model_path": str(other)})["config.student_adapter_path"]
    assert "model.layers.0.mlp.down_proj.lora_a has shape (128, 4), the base model needs (192, 4)" in found
    (adapter / WEIGHTS).unlink()
    assert "no such file" in faults(settings)["config.student_adapter_path"]
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    assert "adapter_model.safetensors: no such file" in faults(settings)["config.student_adapter_path"]
