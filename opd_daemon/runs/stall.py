"""Noticing a run that no longer gets anywhere although its worker is alive."""

from __future__ import annotations

from dataclasses import dataclass

WARNING_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class StallPolicy:
    """Seconds without progress after which a run is said to stall, and after which its worker is ended; 0: never."""

    warning: float = WARNING_SECONDS
    limit: float = 0.0


USUAL = StallPolicy()


class StallClock:
    """Counts the time since a run last got anywhere: an event or a reading of its worker. Times are monotonic."""

    def __init__(self, policy: StallPolicy, now: float) -> None:
        self._policy = policy
        self._since = now
        self._warned = False

    def progressed(self, now: float) -> None:
        """The run got somewhere."""
        self._since, self._warned = now, False

    def silence(self, now: float) -> float:
        """Seconds since the run last got anywhere."""
        return now - self._since

    def seconds_left(self, now: float) -> float | None:
        """Until the next warning or end is due; None when none will be."""
        due = [] if self._warned or not self._policy.warning else [self._policy.warning]
        due += [self._policy.limit] if self._policy.limit else []
        return max(min(due) - self.silence(now), 0.0) if due else None

    def warns(self, now: float) -> bool:
        """Whether to warn now; once for each silence."""
        if self._warned or not self._policy.warning or self.silence(now) < self._policy.warning:
            return False
        self._warned = True
        return True

    def is_over(self, now: float) -> bool:
        """Whether the worker has had its time."""
        return bool(self._policy.limit) and self.silence(now) >= self._policy.limit
