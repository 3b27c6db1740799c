"""Token tables on disk, and the text of single tokens."""

from __future__ import annotations

from pathlib import Path

from opd_daemon.distill.token_table import (
    CompletionTable,
    PositionCurve,
    TokenTable,
    read_token_tables,
    token_texts,
    write_token_tables,
)
from tests.tiny import tiny_tokenizer


def table(step: int) -> TokenTable:
    numbers = (0.5, 0.25)
    completion = CompletionTable(
        "What?", (" the", "…"), numbers, numbers, numbers, numbers, teacher_top=(" a", "…"), student_top=("b", "\n")
    )
    return TokenTable(step, (completion,), PositionCurve((0, 2), (0.1, 0.2), (0.3, 0.4), (10, 5)))


def test_tables_come_back_as_they_were_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "run_tokens.json"
    write_token_tables(path, [table(8), table(0)])
    assert read_token_tables(path) == [table(0), table(8)]


def test_a_run_that_was_never_evaluated_has_no_tables(tmp_path: Path) -> None:
    assert read_token_tables(tmp_path / "missing.json") == []


def test_texts_of_tokens_make_up_the_completion() -> None:
    tokenizer = tiny_tokenizer()
    text = "The tide – twice a day – déjà 汐 🌊 end"
    ids = tokenizer.encode(text).ids
    texts = token_texts(tokenizer.decode, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert any(character in texts for character in ("汐", "🌊"))


def test_a_space_dropped_at_the_beginning_of_a_text_is_not_lost() -> None:
    words = {1: " one", 2: " two", 3: " three"}
    texts = token_texts(lambda ids: "".join(words[token] for token in ids).removeprefix(" "), [1, 2, 3, 2])
    assert texts == ("one", " two", " three", " two")
