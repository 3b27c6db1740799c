"""How fast the teacher gets through its queue: what a client that is refused is told to wait."""

from __future__ import annotations

# Before anything is measured; a guess between a laptop's and a workstation's.
FIRST_TOKENS_PER_SECOND = 500.0
# Weight of the newest measurement in the running mean.
NEWEST = 0.2
SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 60.0


class Pace:
    """A running mean of tokens scored in a second."""

    def __init__(self) -> None:
        self._tokens_per_second = FIRST_TOKENS_PER_SECOND

    def measured(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long."""
        if seconds > 0:
            self._tokens_per_second += NEWEST * (tokens / seconds - self._tokens_per_second)

    def seconds(self, tokens: int) -> float:
        """How long so many take, as a time worth waiting: neither at once nor for ever."""
        return min(max(tokens / self._tokens_per_second, SHORTEST_SECONDS), LONGEST_SECONDS)
