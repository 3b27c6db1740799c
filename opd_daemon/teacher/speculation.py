"""What speculative decoding is asked to do, and what it answers; `speculative` does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opd_daemon.teacher.folder import open_folder
from opd_daemon.teacher.memory import check_memory


@dataclass(frozen=True, slots=True)
class Speculation:
    """What to do. base, adapter: folders of the draft model. prompts: token ids. temperature 0 is greedy.

    masked_token_ids: ids the draft's tokenizer doesn't know, which the teacher is not to say.
    """

    base: Path
    adapter: Path
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    masked_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SpeculativeToken:
    """One token of one prompt's completion; finish_reason is empty except on the last: "stop" or "length"."""

    prompt_index: int
    token_id: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Speculated:
    """What was measured over all prompts, whose own time counts. draft_bytes: of the draft model with its adapter."""

    tokens: int
    seconds: float
    drafted: int
    accepted: int
    draft_bytes: int
    adapter_bytes: int
    peak_bytes: int


def check_draft(base: Path) -> None:
    """Refuse a draft model that has no room beside what runs already. Raises OUT_OF_MEMORY."""
    check_memory(open_folder(str(base)), 0)
