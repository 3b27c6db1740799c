"""Vocabularies compared by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opd_daemon.errors import OpdError, Reason
from opd_daemon.vocabulary import compare_vocabularies, load_vocabulary, vocabulary_digest
from tests.tiny import write_tiny_qwen2


def test_the_vocabulary_is_that_of_transformers(tiny_teacher: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_teacher).get_vocab()
    assert load_vocabulary(tiny_teacher) == {index: token for token, index in theirs.items()}


def test_models_of_other_widths_and_one_tokenizer_match(tiny_teacher: Path, tmp_path: Path) -> None:
    wide = load_vocabulary(write_tiny_qwen2(tmp_path / "wide", vocab=1024))
    match = compare_vocabularies(load_vocabulary(tiny_teacher), wide)
    assert match.compatible
    assert (match.shared_size, match.only_teacher, match.only_student) == (403, (), ())
    assert vocabulary_digest(wide) == vocabulary_digest(load_vocabulary(tiny_teacher))


def test_a_superset_matches_and_its_extra_ids_are_named(tiny_student: Path, tmp_path: Path) -> None:
    teacher = load_vocabulary(write_tiny_qwen2(tmp_path / "super", extra_tokens=("<think>", "</think>")))
    match = compare_vocabularies(teacher, load_vocabulary(tiny_student))
    assert match.compatible
    assert (match.only_teacher, match.only_student) == ((403, 404), ())
    assert vocabulary_digest(teacher) != vocabulary_digest(load_vocabulary(tiny_student))


def test_tokenizers_that_disagree_name_the_first_tokens(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = load_vocabulary(tiny_teacher)
    student = load_vocabulary(write_tiny_qwen2(tmp_path / "shuffled", shuffled_vocab=True))
    match = compare_vocabularies(teacher, student)
    assert not match.compatible
    assert len(match.disagreements) == 5
    for index, ours, theirs in match.disagreements:
        assert (ours, theirs) == (teacher[index], student[index])
        assert ours != theirs


def test_a_unigram_vocabulary_is_read_by_place(tmp_path: Path) -> None:
    model = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert load_vocabulary(tmp_path) == {0: "<unk>", 1: "a"}


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}', "[]"])
def test_a_folder_without_a_readable_tokenizer_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(OpdError, match="tokenizer") as caught:
        load_vocabulary(tmp_path)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_qwen3_is_qwen2_5_plus_four_tokens(qwen3_tokenizer: Path, qwen25_tokenizer: Path) -> None:
    teacher, student = load_vocabulary(qwen3_tokenizer), load_vocabulary(qwen25_tokenizer)
    match = compare_vocabularies(teacher, student)
    assert match.compatible
    assert (match.shared_size, match.only_student) == (151_665, ())
    assert [teacher[index] for index in match.only_teacher] == [
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
    ]


def test_a_folder_without_a_tokenizer_is_called_what_its_client_calls_it(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="no tokenizer in ~/teacher: it holds no") as missing:
        load_vocabulary(tmp_path, "~/teacher")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OpdError, match=r"no tokenizer in ~/teacher: tokenizer.json is broken") as broken:
        load_vocabulary(tmp_path, "~/teacher")
    for error in (missing.value, broken.value):
        assert error.metadata["path"] == "~/teacher"
