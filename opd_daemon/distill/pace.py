"""How long the rest of a run takes, from what its steps and evaluations took so far."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from opd_daemon.distill.metrics import median

RECENT_STEPS = 20


class Pace:
    """Medians of the recent steps: of the completions, and of everything else.

    Completions made ahead for later steps are paid for in one step; their time is spread over the steps they are for,
    so that such a step is no spike and the others are not taken for free. Everything else counts by two steps in a
    row: with rollouts a step ahead every other step waits for the teacher. The first step, which also does what is
    done once, counts until there are two others.
    """

    def __init__(self) -> None:
        self._rollouts: deque[float] = deque(maxlen=RECENT_STEPS)
        self._others: deque[float] = deque(maxlen=RECENT_STEPS)
        self._share = 0.0
        self._evaluation: float | None = None
        self.steps_ahead = 0

    def step(self, seconds: float, rollout_seconds: float, steps_made: int = 0) -> None:
        """A step took so long, its completions included; in it, those of `steps_made` steps were made, 0 if its own."""
        if steps_made:
            self._share, self.steps_ahead = rollout_seconds / steps_made, steps_made
        self._rollouts.append(self._share if self.steps_ahead else rollout_seconds)
        self._others.append(seconds - rollout_seconds)
        self.steps_ahead = max(0, self.steps_ahead - 1)

    def evaluation(self, seconds: float) -> None:
        """An evaluation took so long. The first one also waits for the teacher to score its completions."""
        self._evaluation = seconds if self._evaluation is None else min(seconds, self._evaluation)

    def seconds(self, steps: int, rollouts: int, evaluations: int) -> float:
        """For so many steps, completions for so many of them, and evaluations."""
        pairs = [(one + next_one) / 2 for one, next_one in pairwise(self._others)]
        work = steps * median(pairs[1:] or pairs or self._others) + rollouts * median(self._rollouts)
        return work + evaluations * (self._evaluation or 0.0)
