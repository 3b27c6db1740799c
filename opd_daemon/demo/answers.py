"""What student and teacher answer to the same held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opd_daemon.client import Client
from opd_daemon.distill.report.answers import Answers
from opd_daemon.distill.report.answers import student_answers as answered
from opd_daemon.types import Event, EventKind, GenerateRequest


def student_answers(events: Iterable[Event]) -> list[Answers]:
    """Prompts the student answered both before the first step and after the last one, from the run's samples."""
    return answered(event.payload for event in events if event.kind is EventKind.SAMPLE)


def teacher_answers(client: Client, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """The teacher's greedy answers."""
    ids = [client.tokenize_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    requests = [GenerateRequest(tuple(prompt), max_tokens, temperature=0.0) for prompt in ids]
    texts = [""] * len(requests)
    for piece in client.stream_generation(requests):
        texts[piece.prompt_index] += piece.text
    return texts
