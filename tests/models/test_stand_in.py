"""Stand-ins have another model's shapes with fewer layers and random weights, and load as it does."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from opd_daemon.models.folder import read_folder
from opd_daemon.models.stand_in import write_stand_in
from tests.sparse import write_sparse_model


def test_a_stand_in_answers_like_any_model(tiny_teacher: Path, tmp_path: Path) -> None:
    whole = read_folder(tiny_teacher)
    folder = read_folder(write_stand_in(whole, tmp_path / "short", 1))
    assert folder.number("num_hidden_layers") == 1
    assert {name: whole.tensors[name].shape for name in folder.tensors} == {
        name: tensor.shape for name, tensor in folder.tensors.items()
    }
    model, tokenizer = load(str(folder.path))
    logits = model(mx.array([tokenizer.encode("The tide comes in")]))
    assert mx.isfinite(logits).all()
    assert float(logits.std()) > 0.1


@pytest.mark.parametrize("bits", [0, 4])
def test_the_weights_of_the_whole_need_not_be_read(tmp_path: Path, bits: int) -> None:
    sizes = {"layers": 48, "hidden": 1280, "inner": 2560, "heads": 10, "kv_heads": 2, "vocab": 1024}
    whole = read_folder(write_sparse_model(tmp_path / "whole", **sizes, bits=bits))
    folder = read_folder(write_stand_in(whole, tmp_path / "short", 2))
    assert folder.weight_bytes < whole.weight_bytes / 10
    model, _ = load(str(folder.path))
    assert len(model.layers) == 2
    assert mx.isfinite(model(mx.array([[1, 2, 3]])).astype(mx.float32)).all()
