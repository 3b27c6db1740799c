"""Reading model folders: what they hold, and what is wrong with them, from configurations and headers alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_daemon.errors import Reason
from opd_daemon.models.folder import FolderFault, read_folder, read_header
from tests.sparse import write_sparse_model
from tests.tiny import write_tiny_qwen2


def test_sizes_come_from_the_headers(tiny_student: Path) -> None:
    folder = read_folder(tiny_student)
    assert folder.name == "student"
    assert folder.weight_bytes == sum(tensor.bytes for tensor in read_header(folder.shards[0]).values())
    assert folder.tensors["model.norm.weight"].shape == (64,)
    assert folder.max_context == 512
    assert len(folder.eos_token_ids) == 2
    assert folder.number("hidden_size") == 64
    assert folder.number("no_such_number", 7) == 7


def test_a_folder_of_any_size_is_read_at_once(tmp_path: Path) -> None:
    folder = read_folder(write_sparse_model(tmp_path / "large", layers=64, hidden=5120, inner=27648, bits=4))
    assert folder.weight_bytes == pytest.approx(18.4e9, rel=0.01)
    assert folder.bits == 4


def lose_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "nothing": (shutil.rmtree, "no such folder", True),
    "no config": (lambda m: (m / "config.json").unlink(), "not a model folder", True),
    "broken config": (lambda m: (m / "config.json").write_text("["), "not valid JSON", False),
    "no object": (lambda m: (m / "config.json").write_text("[]"), "is not a JSON object", False),
    "no type": (lambda m: (m / "config.json").write_text("{}"), "has no 'model_type'", False),
    "own code": (
        lambda m: (m / "config.json").write_text('{"model_type": "a", "model_file": "a.py"}'),
        "own code",
        False,
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds no model*.safetensors", False),
    "lost shard": (lose_shard, "1 of 2 weight files are missing, first model-2.safetensors", False),
    "no header": (lambda m: (m / "model.safetensors").write_bytes(b"\x01"), "not a safetensors file", False),
    "endless header": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "not a safetensors file",
        False,
    ),
    "broken header": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        "its header is broken",
        False,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_names_its_place_and_its_cure(tiny_student: Path, tmp_path: Path, fault: str) -> None:
    damage, says, missing = FAULTS[fault]
    folder = shutil.copytree(tiny_student, tmp_path / "broken")
    damage(folder)
    with pytest.raises(FolderFault, match=str(folder)) as caught:
        read_folder(folder)
    assert says in caught.value.problem
    assert caught.value.missing is missing
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_file_that_is_cut_off_or_too_long_is_told(tiny_student: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    whole = (tiny_student / "model.safetensors").read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(FolderFault, match="cut off"):
        read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(FolderFault, match="too long"):
        read_header(file)


def test_numbers_of_models_that_read_images_are_found(tmp_path: Path) -> None:
    path = write_tiny_qwen2(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "vl", "text_config": config}))
    assert read_folder(path).number("hidden_size") == 64
