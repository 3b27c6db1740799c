"""The adapter folder as others read it: PEFT's form beside mlx-lm's, and the card that says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_daemon.config import LoraConfig
from opd_daemon.distill.adapter import CARD, CONFIG, FILES, WEIGHTS, adapter_faults, adapter_files, lora_faults
from opd_daemon.distill.checkpoints import copy_adapter
from opd_daemon.distill.model_card import CardFacts, is_card
from opd_daemon.distill.peft import PEFT_WEIGHTS, mlx_name, peft_name
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import read_folder

TOKENS = mx.array([[5, 6, 7, 8]])
FACTS = CardFacts(
    run_id="run_1",
    base="/models/pupil",
    teacher="/models/master",
    teacher_digest="sha256:abcdef",
    trainer="on_policy",
    settings={"divergence": "reverse_kl", "temperature": 1.0},
    steps=30,
    tokens=12345,
    before={"reverse_kl": 1.5},
    after={"reverse_kl": 0.75},
    version="9.9",
)


def written(base: Path, folder: Path, **lora: Any) -> Student:
    student = Student.load(base, None, LoraConfig(**{"rank": 4, **lora}), seed=3)
    student.update({name: tensor + 0.02 for name, tensor in student.parameters().items()})
    student.save_adapter(folder, FACTS)
    return student


def only_peft(folder: Path, **changes: Any) -> Path:
    """The folder as PEFT itself would have written it."""
    (folder / WEIGHTS).unlink()
    content = json.loads((folder / CONFIG).read_text())
    for name in ("fine_tune_type", "num_layers", "lora_parameters", "model"):
        del content[name]
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"num_layers": 1, "keys": ["self_attn.q_proj"]}], ids=str)
def test_peft_and_mlx_lm_find_the_same_adapter(tiny_student: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    student = written(tiny_student, tmp_path, **lora)
    expected = np.array(student.model(TOKENS))
    model, _ = mlx_lm.load(str(tiny_student), adapter_path=str(tmp_path))
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 1e-5
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(tmp_path / PEFT_WEIGHTS)
    assert {peft_name(name) for name in ours} == theirs.keys()
    assert all(np.array_equal(tensor.T, theirs[peft_name(name)]) for name, tensor in ours.items())
    assert all(mlx_name(peft_name(name)) == name for name in ours)
    content = json.loads((tmp_path / CONFIG).read_text())
    assert content["lora_alpha"] == content["r"] * student.adapter.scale
    assert content["use_dora"] is bool(lora.get("dora"))
    assert content["layers_to_transform"] == ([1] if lora.get("num_layers") else [0, 1])
    again = Student.load(tiny_student, only_peft(tmp_path), LoraConfig(rank=99), seed=0)
    assert np.abs(np.array(again.model(TOKENS)) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is set"),
    ],
)
def test_what_mlx_lm_cannot_hold_of_peft_is_refused(
    tiny_student: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    written(tiny_student, tmp_path)
    base = read_folder(tiny_student)
    folder = only_peft(tmp_path, **changes)
    (fault,) = adapter_faults(folder, base.tensors, base.bits)
    assert says in fault
    with pytest.raises(OpdError) as caught:
        Student.load(tiny_student, folder, LoraConfig(), seed=0)
    assert caught.value.reason == Reason.INVALID_RUN_CONFIG


def test_peft_adapters_of_other_blocks_than_the_last_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    written(tiny_student, tmp_path)
    folder = only_peft(tmp_path)
    tensors = load_file(folder / PEFT_WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.0." in name}, folder / PEFT_WEIGHTS)
    base = read_folder(tiny_student)
    assert "adapts block 0 of 2 with num_layers 1" in adapter_faults(folder, base.tensors, base.bits)[0]
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.1." in name}, folder / PEFT_WEIGHTS)
    assert adapter_faults(folder, base.tensors, base.bits) == []


def test_peft_adapters_of_other_kinds_of_tensors_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    written(tiny_student, tmp_path)
    folder = only_peft(tmp_path)
    save_file({"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, folder / PEFT_WEIGHTS)
    base = read_folder(tiny_student)
    assert "is no tensor of a LoRA or DoRA adapter" in adapter_faults(folder, base.tensors, base.bits)[0]


def test_rank_stabilised_scale_is_taken_over(tiny_student: Path, tmp_path: Path) -> None:
    written(tiny_student, tmp_path)
    folder = only_peft(tmp_path, use_rslora=True, lora_alpha=6)
    assert Student.load(tiny_student, folder, LoraConfig(), seed=0).adapter.scale == pytest.approx(3.0)


def test_the_card_says_how_it_was_made(tiny_student: Path, tmp_path: Path) -> None:
    written(tiny_student, tmp_path, dora=True)
    text = (tmp_path / CARD).read_text()
    for part in ("pupil, taught by master", "DoRA, rank 4", "12,345", "run_1", "opd 9.9", "abcdef", "1.5000 | 0.7500"):
        assert part in text
    assert 'mlx_lm.load("/models/pupil"' in text
    assert "PeftModel.from_pretrained" in text
    assert is_card(tmp_path / CARD)


def test_a_step_checkpoint_stays_small(tiny_student: Path, tmp_path: Path) -> None:
    Student.load(tiny_student, None, LoraConfig(rank=4), seed=3).save_adapter(tmp_path)
    assert sorted(path.name for path in adapter_files(tmp_path)) == sorted([CONFIG, WEIGHTS])


def test_a_copy_takes_all_files_and_leaves_no_other_weights(tiny_student: Path, tmp_path: Path) -> None:
    finished, target = tmp_path / "finished", tmp_path / "out"
    written(tiny_student, finished)
    copy_adapter(finished, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
    Student.load(tiny_student, None, LoraConfig(rank=2), seed=0).save_adapter(tmp_path / "small")
    copy_adapter(tmp_path / "small", target)
    assert not (target / PEFT_WEIGHTS).exists()


def test_a_readme_of_somebodys_own_stays(tiny_student: Path, tmp_path: Path) -> None:
    written(tiny_student, tmp_path / "finished")
    target = tmp_path / "out"
    target.mkdir()
    (target / CARD).write_text("my project")
    copy_adapter(tmp_path / "finished", target)
    assert (target / CARD).read_text() == "my project"


def test_settings_the_base_cannot_have_are_named(tiny_student: Path) -> None:
    base = read_folder(tiny_student)
    assert list(lora_faults(LoraConfig(), base)) == []
    ((field, says),) = lora_faults(LoraConfig(keys=["self_attn.q_proj", "attention.query"]), base)
    assert field == "keys"
    assert "attention.query is no layer" in says


def test_layers_outside_the_blocks_are_not_trained(tiny_student: Path) -> None:
    with pytest.raises(OpdError, match="outside the model's blocks"):
        Student.load(tiny_student, None, LoraConfig(keys=["self_attn.q_proj", "model.embed_tokens"]), seed=0)
