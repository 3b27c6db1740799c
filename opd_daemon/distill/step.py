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
        self.peaks: dict[str, int] = {}
        self.peak_bytes = 0
        self.grad_norm = 0.0
        self.began_update = False
        self.updated = False
        self._gradients: Any = None
        self._optimizer = optimizer
        self._journal = journal
        self._should_stop = should_stop
        self._shows_sample = shows_sample

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take a phase's time in milliseconds and MLX's peak in bytes: "rollout", "score" or "train".

        Ends the step when a stop was asked for, unless the student is updated already.
        """
        if self._should_stop() and not self.began_update:
            raise StopRequested
        self._read_peak()
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + 1000.0 * (time.perf_counter() - started)
        self.peaks[name] = max(self.peaks.get(name, 0), self._read_peak())
        readings = {"step": self.number, "active_memory_bytes": mx.get_active_memory()}
        self._journal.gauges({**readings, "peak_memory_bytes": self.peak_bytes})

    def log_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the step's rollouts on disk."""
        self.record.take(rollouts)
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
        """Divide by the step's count, clip, and update the student; left out where a number is none."""
        if self._gradients is None:
            self.updated = True
            return
        scale = 1.0 / max(self.record.count, 1.0)
        gradients, self.grad_norm = clipped(
            tree_map(lambda gradient: gradient * scale, self._gradients), self._optimizer.config.max_grad_norm
        )
        if self.finite:
            self.began_update = True
            self._optimizer.update(gradients, self.number)
        self._gradients = None
        self.updated = True

    def _read_peak(self) -> int:
        """MLX's peak since the last reading; the step's own peak takes it in."""
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        self.peak_bytes = max(self.peak_bytes, peak)
        return peak

    @property
    def idle(self) -> bool:
        """Whether there was nothing to learn from, as everything was masked."""
        return not self.record.count

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.record.loss) and math.isfinite(self.grad_norm)


def step_seed(seed: int, step: int) -> int:
    """A seed for one step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
