"""The same held-out prompts answered by the student before and after training, and by its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opd_daemon.distill.report.record import RunRecord


@dataclass(frozen=True, slots=True)
class Answers:
    """Completions of one prompt."""

    prompt: str
    before: str
    after: str
    teacher: str = ""


def student_answers(samples: Iterable[Mapping[str, Any]]) -> list[Answers]:
    """Prompts the student answered both before the first step and after a later one."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for sample in samples:
        if sample["source"] == "student":
            by_prompt.setdefault(sample["prompt"], []).append((sample["step"], sample["completion"]))
    return [
        Answers(prompt, given[0][1], given[-1][1])
        for prompt, given in by_prompt.items()
        if given[0][0] == 0 and given[-1][0] > 0
    ]


def all_answers(record: RunRecord) -> list[Answers]:
    """The student's answers, each with the teacher's where the run has it: as a sample, or as tokens it compared."""
    given = {entry.prompt: "".join(entry.tokens) for table in record.tables for entry in table.completions}
    given |= {sample["prompt"]: sample["completion"] for sample in record.samples if sample["source"] == "teacher"}
    return [replace(entry, teacher=given.get(entry.prompt, "")) for entry in student_answers(record.samples)]
