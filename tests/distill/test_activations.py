"""What a forward keeps for its backward, foretold and counted."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import Backward, LoraConfig
from opd_daemon.distill.activations import block_bytes, kept_blocks
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.student import Student
from opd_daemon.distill.tape import record
from tests.tiny import write_tiny_qwen2

LAYERS = 4
SHAPES: list[dict[str, Any]] = [
    {"hidden": 64, "heads": 4, "kv_heads": 2},
    {"hidden": 256, "heads": 4, "kv_heads": 1},
    {"hidden": 128, "heads": 8, "kv_heads": 8},
]
ADAPTERS: list[dict[str, Any]] = [{}, {"rank": 32}, {"dropout": 0.1}, {"dora": True}]


def kept_bytes(student: Student, tokens: mx.array, kept: int) -> int:
    gc.collect()  # models of earlier tests would go in the middle of the measurement
    mx.clear_cache()
    before = mx.get_active_memory()
    assert student.blocks
    tape = record(student.blocks, tokens, mx.arange(3), kept=kept, seed=0)
    held = mx.get_active_memory() - before
    del tape
    return held


@pytest.mark.skipif(not on_host(), reason="a GPU's attention keeps something else")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_a_kept_block_takes_the_bytes_that_were_foretold(
    tmp_path: Path, shape: dict[str, Any], adapter: dict[str, Any]
) -> None:
    path = write_tiny_qwen2(tmp_path / "model", layers=LAYERS, **shape)
    lora = LoraConfig(**{"rank": 4, **adapter})
    student = Student.load(path, None, lora, seed=0)
    assert student.blocks
    student.model.train()
    for sequences, length in ((2, 64), (3, 256)):
        tokens = mx.array(np.random.default_rng(0).integers(1, 400, (sequences, length)).astype(np.int32))
        found = (kept_bytes(student, tokens, LAYERS - 1) - kept_bytes(student, tokens, 1)) / (LAYERS - 2)
        assert block_bytes(student.shape, sequences, length, lora, on_host=True) == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize(
    ("mode", "each", "kept"),
    [
        ("plain", 1 << 40, 10),
        ("checkpoint", 1 << 40, 5),
        ("layerwise", 1, 0),
        ("auto", 1 << 20, 10),
        ("auto", 1 << 28, 4),
        ("auto", 1 << 40, 0),
    ],
)
def test_a_mode_says_how_many_blocks_are_kept(mode: Backward, each: int, kept: int) -> None:
    assert kept_blocks(mode, 10, each, 8 << 30) == kept
