"""A Qwen3 teacher and a Qwen2.5 student: real tokenizers, real widths, the pair people try first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import LoraConfig, parse_config
from opd_daemon.distill.batches import pack
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import gradient
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.session import mask_vocabulary, unshared_ids
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from tests.distill.local_teacher import LocalTeacher
from tests.distill.reference import jsd, log_softmax
from tests.tiny import write_tiny_qwen2

THINK = (151_665, 151_666, 151_667, 151_668)
SHARED = 151_665


def write_pair(folder: Path, qwen3: Path, qwen25: Path) -> tuple[Path, Path]:
    """Small models with the outputs of Qwen3-32B (151 936) and Qwen2.5-7B (152 064)."""
    teacher = write_tiny_qwen2(folder / "teacher", seed=1, layers=1, hidden=24, vocab=151_936)
    student = write_tiny_qwen2(folder / "student", seed=2, layers=1, hidden=16, vocab=152_064)
    for model, files in ((teacher, qwen3), (student, qwen25)):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(files / name, model / name)
    return teacher, student


@pytest.mark.parametrize("signal", ["exact", "sparse"])
def test_ids_only_one_side_knows_have_no_mass_and_the_loss_is_that_over_the_shared_ones(
    tmp_path: Path, qwen3_tokenizer: Path, qwen25_tokenizer: Path, signal: str
) -> None:
    teacher_path, student_path = write_pair(tmp_path, qwen3_tokenizer, qwen25_tokenizer)
    config = parse_config(
        {
            "base_model_path": str(student_path),
            "teacher_model_path": str(teacher_path),
            "prompts_path": "p",
            "divergence": "jsd",
            "signal": signal,
            "top_k": 1024,
            "temperature": 1.0,
            "kl_weight": 1.0,
            "ce_weight": 0.0,
            "exact_fraction": 1.0,
        }
    )
    teacher = LocalTeacher(teacher_path)
    student = Student.load(student_path, None, LoraConfig(rank=2), seed=0)
    said: list[str] = []
    unshared = unshared_ids(config, said.append)
    mask_vocabulary(student, teacher, unshared)
    masked = tuple(index for index in unshared if index < teacher.info.vocab_size)
    assert masked == THINK
    assert "4 ids" in said[0]

    made = Rollout(Prompt(0, "", (100, 2000, 30_000)), (5, 151_645, 140_000, 77), "stop", "student")
    objective = Objective.from_config(config, head=lambda: HeadMatrix(teacher.head(), student.vocabulary))
    batch = pack([made], ask(teacher, [made], config, masked), 1.0, "completion")
    found = gradient(student, batch, objective)

    def shared(model: Any) -> Any:
        return np.array(model(mx.array(made.token_ids)[None]), np.float64)[0, 2:-1, :SHARED]

    expected = jsd(0.5)(log_softmax(shared(teacher.model)), log_softmax(shared(student.model)))
    exact = found.values["kl"] + found.values.get("bias_gap", 0.0)
    assert exact == pytest.approx(expected, rel=1e-5)
    logits = student.logits(mx.array(made.token_ids)[None])
    assert logits.shape[-1] == 151_936
    assert float(logits[..., SHARED:].max()) < -1e29
    if signal == "sparse":
        assert (found.values["bias_gap"] > 0).all()
