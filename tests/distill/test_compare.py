"""What a comparison asks of the teacher, in this process; with real processes, see `tests/e2e/test_compare.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from opd_daemon.config import parse_config
from opd_daemon.distill.compare import Comparison, Piece, Wardrobe
from opd_daemon.distill.memory import limited_memory
from opd_daemon.types import ComparisonRequest, GenerateRequest, ModelAnswer
from tests.distill.local_teacher import LocalTeacher
from tests.distill.test_adapter_folder import TOKENS, only_peft, written
from tests.tiny import write_tiny_qwen2


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """A comparison has a process of its own, and limits it for good."""
    with limited_memory():
        yield


@pytest.mark.parametrize("models", [("base", "teacher"), ("base",)])
def test_the_teacher_says_only_what_the_students_know(
    models: tuple[str, ...], tiny_student: Path, tmp_path: Path
) -> None:
    wide = write_tiny_qwen2(tmp_path / "wide", seed=1, layers=3, extra_tokens=("<think>", "</think>"), vocab=700)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": "two"}))
    teacher = LocalTeacher(wide)
    config = parse_config(
        {
            "base_model_path": str(tiny_student),
            "teacher_model_path": str(wide),
            "prompts_path": str(tmp_path / "rows.jsonl"),
        }
    )
    asked: list[GenerateRequest] = []
    told: list[ModelAnswer] = []

    def speak(request: GenerateRequest) -> Iterator[Piece]:
        asked.append(request)
        yield Piece((7, 8), "so", "length")

    request = ComparisonRequest("run", ("Tell me about the tide.",), 8, models=models)
    Comparison(request, config=config, adapters={}, teacher=teacher, speak=speak, report=told.append).run()
    only_teacher = {teacher.info.vocab_size - 1, teacher.info.vocab_size - 2}
    requests = [*asked, *teacher.written]
    assert requests
    assert all(set(request.masked_token_ids) == only_teacher for request in requests)
    summary = told[-1].summary
    assert summary is not None
    assert summary.forward_kl is not None
    assert summary.forward_kl > 0


def test_an_adapter_that_only_peft_wrote_is_worn(tiny_student: Path, tmp_path: Path) -> None:
    expected = written(tiny_student, tmp_path).logits(TOKENS)
    config = parse_config(
        {"base_model_path": str(tiny_student), "teacher_model_path": str(tiny_student), "prompts_path": "/p"}
    )
    with Wardrobe(config).wearing(only_peft(tmp_path)) as student:
        assert mx.allclose(student.logits(TOKENS), expected, atol=1e-5)
