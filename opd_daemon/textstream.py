"""Text of a completion as it grows: a token may hold only part of a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WINDOW = 16


class TextStream:
    """Turns token ids, one at a time, into pieces of text that join to the whole completion."""

    def __init__(self, detokenize: Callable[[Sequence[int]], str], eos_token_ids: Sequence[int]) -> None:
        self._detokenize = detokenize
        self._eos = frozenset(eos_token_ids)
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token_id: int, *, last: bool) -> str:
        """The text this token completes; empty while a character is still incomplete."""
        if token_id not in self._eos:
            self._ids.append(token_id)
        text = self._detokenize(self._ids)
        if text.endswith(REPLACEMENT) and not last:
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        if len(self._ids) > WINDOW and not text.endswith(REPLACEMENT):
            # Keep one token of context: some tokenizers join a leading space to the token before.
            self._ids = self._ids[-1:]
            self._shown = len(self._detokenize(self._ids))
        return new
