"""One optimizer update, as a trainer sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import BatchGradient
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.metrics import TokenRecord
from opd_daemon.distill.optimizer import Optimizer, clipped
from opd_daemon.distill.rollouts import Rollout


class StopRequested(Exception):
    """Someone asked the run to stop; raised between the phases of a step, so that nobody waits for a long one."""


class Step:
    """What a trainer does its work with: `phase`, `log_rollouts`, `accumulate` for every micro-batch, then `update`.

    number: 1 … num_steps. prompts: those of this step. seed: differs from step to step, the same in a resumed run.
    """

    def __init__(
        self,
        number: int,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        optimizer: Optimizer,
        journal: Journal,
        should_stop: Callable[[], bool],
        shows_sample: bool,
    ) -> None:
        self.number = number
        self.prompts = list(prompts)
        self.seed = seed
        self.record = TokenRecord()
        self.phases: dict[str, float] = {}
        self.grad_norm = 0.0
        self.updated = False
        self._gradients: Any = None
        self._optimizer = optimizer
        self._journal = journal
        self._should_stop = should_stop
        self._shows_sample = shows_sample

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase in milliseconds: "rollout", "score" or "train". Ends the step when a stop was asked for."""
        if self._should_stop():
            raise StopRequested
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + 1000.0 * (time.perf_counter() - started)
        readings = {"step": self.number, "active_memory_bytes": mx.get_active_memory()}
        self._journal.gauges({**readings, "peak_memory_bytes": mx.get_peak_memory()})

    def log_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the step's rollouts on disk."""
        self._journal.rollouts(self.number, rollouts, sample=self._shows_sample)

    def accumulate(self, result: BatchGradient) -> None:
        """Add a micro-batch's summed gradient."""
        added = result.gradients
        if self._gradients is not None:
            added = tree_map(mx.add, self._gradients, added)
            mx.eval(added)
        self._gradients = added
        self.record.add(result)

    def update(self) -> None:
        """Divide by the step's token count, clip, and update the student; left out where a number is none."""
        scale = 1.0 / max(self.record.count, 1.0)
        gradients, self.grad_norm = clipped(
            tree_map(lambda gradient: gradient * scale, self._gradients), self._optimizer.config.max_grad_norm
        )
        if self.finite:
            self._optimizer.update(gradients, self.number)
        self._gradients = None
        self.updated = True

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.record.loss) and math.isfinite(self.grad_norm)


def step_seed(seed: int, step: int) -> int:
    """A seed for one step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
