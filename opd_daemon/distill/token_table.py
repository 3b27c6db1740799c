"""A few held-out completions token by token, before and after: where student and teacher differ, and how much.

One JSON file a run, `metrics/{run_id}_tokens.json`: a list of tables, of step 0 and of the newest evaluation. Nothing
heavy is imported here, so that a report can be drawn anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_daemon.distill.files import write_file

CONTEXT_TOKENS = 4
UNFINISHED = "\ufffd"  # what tokenizers write for bytes that are no whole character yet


@dataclass(frozen=True, slots=True)
class CompletionTable:
    """One of the teacher's greedy completions; one entry per token everywhere but in `prompt`.

    tokens, teacher_top, student_top: texts of the token that is there and of each model's most likely one.
    forward_kl, reverse_kl: nats, of the distributions the token was drawn from. *_logprob: of the token, nats.
    """

    prompt: str
    tokens: tuple[str, ...]
    forward_kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    teacher_logprob: tuple[float, ...]
    student_logprob: tuple[float, ...]
    teacher_top: tuple[str, ...]
    student_top: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PositionCurve:
    """Mean KLs by place in the completion, over all held-out completions of the teacher.

    start: first token of each bin, from 0; the bins follow each other. count: tokens in it, never 0.
    """

    start: tuple[int, ...]
    forward_kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What the student knew of its teacher's words after `step` updates."""

    step: int
    completions: tuple[CompletionTable, ...]
    by_position: PositionCurve


def write_token_tables(path: Path, tables: Sequence[TokenTable]) -> None:
    """Write the file of a run, oldest step first. Raises DISK_FULL."""
    ordered = sorted(tables, key=lambda table: table.step)
    write_file(path, json.dumps([asdict(table) for table in ordered], ensure_ascii=False).encode())


def read_token_tables(path: Path) -> list[TokenTable]:
    """The tables of a run, oldest step first; none where nothing was evaluated yet."""
    if not path.exists():
        return []
    return [_table(content) for content in json.loads(path.read_text(encoding="utf-8"))]


def _table(content: dict[str, Any]) -> TokenTable:
    completions = tuple(CompletionTable(**_frozen(entry)) for entry in content["completions"])
    return TokenTable(content["step"], completions, PositionCurve(**_frozen(content["by_position"])))


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def token_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> tuple[str, ...]:
    """The text each token adds to a completion; a character made of several tokens is the last one's.

    Tokens are decoded behind a few earlier ones, as some tokenizers drop a space at the beginning of a text.
    """
    texts = []
    for end in range(1, len(ids) + 1):
        start = max(0, end - 1 - CONTEXT_TOKENS)
        before, text = decode(list(ids[start : end - 1])), decode(list(ids[start:end]))
        known = next((place for place, (old, new) in enumerate(zip(before, text, strict=False)) if old != new), None)
        texts.append(text[min(len(before), len(text)) if known is None else known :].rstrip(UNFINISHED))
    return tuple(texts)
