"""Students: adapters that load in mlx-lm, a base that stays as it was, heads split only where that is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from opd_daemon.config import LoraConfig
from opd_daemon.distill.adapter import CONFIG, WEIGHTS
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason

TOKENS = mx.array([[5, 6, 7, 8]])


@pytest.fixture
def student(tiny_student: Path) -> Student:
    loaded = Student.load(tiny_student, None, LoraConfig(rank=4), seed=3)
    loaded.update({name: tensor + 0.02 for name, tensor in loaded.parameters().items()})
    return loaded


def test_only_adapter_tensors_are_trainable_and_a_fresh_one_changes_nothing(tiny_student: Path) -> None:
    student = Student.load(tiny_student, None, LoraConfig(rank=4), seed=3)
    assert {name.rpartition(".")[2] for name in student.parameters()} == {"lora_a", "lora_b"}
    plain, _ = mlx_lm.load(str(tiny_student))
    assert mx.allclose(student.model(TOKENS), plain(TOKENS), atol=1e-5)


def test_the_seed_decides_a_fresh_adapter(tiny_student: Path) -> None:
    loaded = [Student.load(tiny_student, None, LoraConfig(rank=4), seed=seed).parameters() for seed in (1, 1, 2)]
    name = next(name for name in loaded[0] if name.endswith("lora_a"))
    assert mx.array_equal(loaded[0][name], loaded[1][name])
    assert not mx.array_equal(loaded[0][name], loaded[2][name])


def test_a_saved_adapter_loads_in_mlx_lm_and_here(student: Student, tiny_student: Path, tmp_path: Path) -> None:
    student.save_adapter(tmp_path)
    expected = np.array(student.model(TOKENS))
    model, _ = mlx_lm.load(str(tiny_student), adapter_path=str(tmp_path))
    plain, _ = mlx_lm.load(str(tiny_student))
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 1e-5
    assert np.abs(np.array(plain(TOKENS)) - expected).max() > 1e-2
    again = Student.load(tiny_student, tmp_path, LoraConfig(rank=99), seed=0)
    assert np.abs(np.array(again.model(TOKENS)) - expected).max() < 1e-5
    assert again.adapter.rank == 4
    again.check_trainable()


def test_dora_adapters_are_taken_on(tiny_student: Path, tmp_path: Path) -> None:
    model, _ = mlx_lm.load(str(tiny_student))
    model.freeze()
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, settings, use_dora=True)
    trained = {name: value + 0.02 for name, value in tree_flatten(model.trainable_parameters())}
    model.update(tree_unflatten(list(trained.items())))
    mx.save_safetensors(str(tmp_path / WEIGHTS), trained)
    content = {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    student = Student.load(tiny_student, tmp_path, LoraConfig(), seed=0)
    assert np.abs(np.array(student.model(TOKENS) - model(TOKENS))).max() < 1e-5
    assert {name.rpartition(".")[2] for name in student.parameters()} == {"lora_a", "lora_b", "m"}


def change(folder: Path, change_weights: Any = None, **settings: Any) -> Path:
    if change_weights:
        weights: Any = mx.load(str(folder / WEIGHTS))
        mx.save_safetensors(str(folder / WEIGHTS), change_weights(weights))
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **settings}))
    return folder


FIRST = "model.layers.0.mlp.down_proj.lora_a"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"change_weights": lambda w: {k: v for k, v in w.items() if k != FIRST}}, f"{FIRST} is missing"),
        ({"change_weights": lambda w: {**w, FIRST: w[FIRST][:-1]}}, f"{FIRST} has shape (127, 4), the student needs"),
        ({"change_weights": lambda w: {**w, "model.norm.weight": w[FIRST]}}, "model.norm.weight has no place"),
        ({"lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}, f"{FIRST} has shape (128, 4)"),
        ({"fine_tune_type": "full"}, "a LoRA or DoRA adapter is needed"),
        ({"lora_parameters": {"rank": 4}}, "has no 'scale'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_first_tensor(
    student: Student, tiny_student: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    student.save_adapter(tmp_path)
    with pytest.raises(OpdError) as caught:
        Student.load(tiny_student, change(tmp_path, **changes), LoraConfig(), seed=0)
    assert caught.value.reason == Reason.INVALID_RUN_CONFIG
    assert says in caught.value.message


def test_keys_that_name_no_layer_are_refused(tiny_student: Path) -> None:
    with pytest.raises(OpdError, match=r"attention\.query.*self_attn\.q_proj"):
        Student.load(tiny_student, None, LoraConfig(keys=["attention.query"]), seed=0)


def test_base_digest_sees_every_change_of_the_base_and_none_of_the_adapter(student: Student) -> None:
    before = student.base_digest()
    student.update({name: tensor + 1 for name, tensor in student.parameters().items()})
    assert student.base_digest() == before
    student.model.model.norm.weight = student.model.model.norm.weight + 1e-6
    assert student.base_digest() != before


def test_logits_are_the_models_own_with_impossible_ids_masked(student: Student) -> None:
    whole = np.array(student.model(TOKENS))
    split = np.array(student.head(student.hidden(TOKENS)[0]))
    assert student.vocab_size < student.width
    assert np.abs(whole[0, :, : student.vocab_size] - split[:, : student.vocab_size]).max() < 1e-5
    assert (split[:, student.vocab_size :] < -1e29).all()
    student.mask_vocabulary([3], width=student.width - 64)
    masked = np.array(student.logits(TOKENS))
    assert masked.shape[-1] == student.width - 64
    assert (masked[..., 3] < -1e29).all()


def test_a_folder_that_cannot_be_built_is_named(tiny_student: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_student, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 65}))
    with pytest.raises(OpdError, match="can't be loaded") as caught:
        Student.load(broken, None, LoraConfig(), seed=0)
    assert caught.value.reason == Reason.MODEL_NOT_FOUND
