"""The prompts that ship with the demo."""

from __future__ import annotations

import json
from importlib import resources


def prompts(name: str) -> list[str]:
    text = resources.files("opd_daemon.demo").joinpath("prompts", name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert all(row.keys() == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


def test_there_are_enough_short_prompts_and_none_twice() -> None:
    train, held_out = prompts("train.jsonl"), prompts("held_out.jsonl")
    assert len(train) >= 140
    assert len(held_out) == 20
    assert len({prompt.casefold() for prompt in train + held_out}) == len(train) + len(held_out)
    assert all(3 <= len(prompt.split()) <= 25 for prompt in train + held_out)


def test_no_held_out_prompt_shares_most_of_its_words_with_a_training_prompt() -> None:
    train = [set(prompt.casefold().split()) for prompt in prompts("train.jsonl")]
    for prompt in prompts("held_out.jsonl"):
        words = set(prompt.casefold().split())
        assert max(len(words & other) / len(words | other) for other in train) < 0.7, prompt
