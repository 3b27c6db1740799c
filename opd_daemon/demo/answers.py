"""What student and teacher answer to the same held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opd_daemon.client import Client
from opd_daemon.types import Event, EventKind, GenerateRequest


@dataclass(frozen=True, slots=True)
class Answers:
    """Completions of one prompt."""

    prompt: str
    before: str
    after: str
    teacher: str = ""


def student_answers(events: Iterable[Event]) -> list[Answers]:
    """Prompts the student answered both before the first step and after the last one, from the run's samples."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for event in events:
        if event.kind is EventKind.SAMPLE and event.payload["source"] == "student":
            answer = (event.payload["step"], event.payload["completion"])
            by_prompt.setdefault(event.payload["prompt"], []).append(answer)
    return [
        Answers(prompt, given[0][1], given[-1][1])
        for prompt, given in by_prompt.items()
        if given[0][0] == 0 and given[-1][0] > 0
    ]


def teacher_answers(client: Client, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """The teacher's greedy answers."""
    ids = [client.tokenize_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    requests = [GenerateRequest(tuple(prompt), max_tokens, temperature=0.0) for prompt in ids]
    texts = [""] * len(requests)
    for piece in client.stream_generation(requests):
        texts[piece.prompt_index] += piece.text
    return texts
