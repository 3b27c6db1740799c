"""`opd compare`: answers and figures for people, pipes and programs."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from opd_daemon.cli import exits
from opd_daemon.cli.compare import Said, picture
from opd_daemon.types import ModelAnswer, ModelSummary
from tests.cli.conftest import Opd


def test_answers_and_figures_of_every_model(opd: Opd, config_file: Path, tmp_path: Path) -> None:
    assert opd("distill", config_file).code == exits.OK
    outcome = opd("compare", "--prompt", "Hello there", "--max-tokens", 5, "--speculative")
    assert outcome.code == exits.OK, outcome.err
    assert "PROMPT 1: Hello there" in outcome.out
    for name in ("base", "distilled", "teacher", "speculative"):
        assert f"[{name}]" in outcome.out
        assert f"{name} answers" in outcome.err
    for title in ("TOK/S", "SPEED-UP", "WEIGHTS", "ADAPTER", "PEAK", "FORWARD KL", "AGREEMENT", "ACCEPTANCE"):
        assert title in outcome.out
    assert "of the drafts kept" in outcome.err

    rows = tmp_path / "asked.jsonl"
    rows.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": "two"}) + "\n")
    document = opd("compare", "last", "--prompts", rows, "--models", "base, teacher", "--max-tokens", 3, "--json").json
    assert document["prompts"] == ["one", "two"]
    assert set(document["models"]) == {"base", "teacher"}
    assert document["models"]["base"]["forward_kl"] > 0
    assert len(document["answers"]) == 4

    held_out = opd("compare", "--models", "base", "--max-tokens", 1, "--json").json
    assert 1 <= len(held_out["prompts"]) <= 3

    wrong = opd("compare", "--prompt", "x", "--models", "gpt")
    assert (wrong.code, "'gpt' is no model of a run" in wrong.err) == (exits.USAGE, True)


@pytest.mark.parametrize(("width", "height"), [(120, 30), (60, 12), (30, 8)])
def test_the_growing_answers_never_outgrow_the_terminal(width: int, height: int) -> None:
    said = Said(["one", "two"])
    for name in ("teacher", "base", "distilled"):
        for index in range(2):
            said.take(ModelAnswer(name, index, "many words " * 400, 400))
    screen = Console(file=StringIO(), width=width, height=height)
    lines = screen.render_lines(picture(said, "base", width, height))
    assert len(lines) <= height
    assert any("base …" in "".join(part.text for part in line) for line in lines)


def test_the_document_holds_what_was_said_and_measured() -> None:
    said = Said(["one"])
    said.take(ModelAnswer("base", 0, "He", 1))
    said.take(ModelAnswer("base", 0, "llo", 1, "stop"))
    said.take(ModelAnswer("base", summary=ModelSummary(2, 0.5, 10)))
    document = said.document("r1")
    assert document["answers"] == [
        {"model": "base", "prompt_index": 0, "text": "Hello", "tokens": 2, "finish_reason": "stop"}
    ]
    assert document["models"]["base"]["tokens_per_second"] == 4.0
