"""Held-out completions token by token: how far student and teacher are apart at each, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opd_daemon.distill.report.measures import BY_NAME, Measure
from opd_daemon.distill.report.record import RunRecord
from opd_daemon.distill.report.summary import headline_measure
from opd_daemon.distill.token_table import CompletionTable, TokenTable

SHOWN_COMPLETIONS = 4
SHOWN_TOKENS = 160
FULL_SCALE_QUANTILE = 0.97
DEEPEST = 0.85
"""Opacity of the deepest colour: the text on it stays readable."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its text, the shade behind it (0 … DEEPEST) and what is told of it when it is pointed at."""

    text: str
    shade: str
    differs: bool
    breaks: bool
    kl: str
    teacher_probability: str
    student_probability: str
    teacher_top: str
    student_top: str


@dataclass(frozen=True, slots=True)
class Side:
    """A completion at one moment of the run, with its mean divergence."""

    title: str
    mean: str
    tokens: list[Token]
    left_out: int


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Completions, each with its sides, and the scale they share. `top`: the divergence of the deepest colour."""

    measure: Measure
    top: str
    completions: list[tuple[str, list[Side]]]


def heatmap(record: RunRecord) -> Heatmap | None:
    """The heat map of a run; None when it has no token tables."""
    tables = [table for table in record.tables if table.completions]
    if not tables:
        return None
    measure = headline_measure(record)
    if measure.name == "js_divergence":
        measure = BY_NAME["forward_kl"]
    top = _full_scale(tables, measure.name)
    completions = []
    for entry in tables[-1].completions[:SHOWN_COMPLETIONS]:
        sides = [
            _side(same, _title(table, tables), measure.name, top)
            for table in tables
            for same in table.completions
            if (same.prompt, same.tokens) == (entry.prompt, entry.tokens)
        ]
        completions.append((entry.prompt, sides))
    return Heatmap(measure, f"{top:.1f}", completions)


def _title(table: TokenTable, tables: list[TokenTable]) -> str:
    if len(tables) > 1:
        return "before" if table is tables[0] else "after"
    return f"at step {table.step}"


def _full_scale(tables: list[TokenTable], name: str) -> float:
    values = sorted(value for table in tables for entry in table.completions for value in _finite(entry, name))
    return max(values[int(FULL_SCALE_QUANTILE * (len(values) - 1))], 0.1) if values else 1.0


def _finite(completion: CompletionTable, name: str) -> Iterator[float]:
    return (value for value in getattr(completion, name) if _is_number(value))


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _side(completion: CompletionTable, title: str, name: str, top: float) -> Side:
    values = list(_finite(completion, name))
    mean = f"{sum(values) / len(values):.2f}" if values else ""
    tokens = [
        _token(completion, place, getattr(completion, name)[place], top) for place in range(len(completion.tokens))
    ]
    return Side(title, mean, tokens[:SHOWN_TOKENS], max(0, len(tokens) - SHOWN_TOKENS))


def _token(completion: CompletionTable, place: int, value: float, top: float) -> Token:
    text = completion.tokens[place]
    share = min(1.0, max(0.0, value / top)) if _is_number(value) else 0.0
    return Token(
        text=visible(text),
        shade=f"{DEEPEST * share:.2f}",
        differs=completion.teacher_top[place] != completion.student_top[place],
        breaks="\n" in text,
        kl=f"{value:.2f}" if _is_number(value) else "?",
        teacher_probability=probability(completion.teacher_logprob[place]),
        student_probability=probability(completion.student_logprob[place]),
        teacher_top=visible(completion.teacher_top[place]),
        student_top=visible(completion.student_top[place]),
    )


def visible(token: str) -> str:
    """A token's text with its line breaks and tabs as signs; spaces stay, as the page keeps them."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or "∅"


def probability(logprob: float) -> str:
    """A logprob with its probability."""
    if not _is_number(logprob):
        return "?"
    share = 100 * math.exp(min(0.0, logprob))
    digits = 0 if share >= 10 else 1 if share >= 1 else 2
    shown = f"{logprob:.2f}".replace("-", "−")
    return f"{shown} ({share:.{digits}f} %)" if share >= 0.005 else shown
