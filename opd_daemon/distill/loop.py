"""The run around a trainer's steps: schedule, evaluation, checkpoints, metrics, stopping and resuming."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from opd_daemon.config import RunConfig
from opd_daemon.distill.checkpoints import OPTIMIZER, Checkpoints, RunProgress, copy_adapter, read_progress
from opd_daemon.distill.data import Prompt, PromptSet
from opd_daemon.distill.evaluation import Evaluator
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.memory import read_memory
from opd_daemon.distill.metrics import StepTimes, median, step_metrics
from opd_daemon.distill.optimizer import Optimizer, learning_rate
from opd_daemon.distill.step import Step, step_seed
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason

FIRST_CHECKPOINT_FRACTION = 0.05
FIRST_CHECKPOINT_SECONDS = 60.0
SKIPS_ALLOWED = 2


class TrainingLoop:
    """Yields the steps still to do, and does around each of them everything that isn't the method itself.

    `progress` says where the run stands; `stopped` is true once it ended because someone asked for it.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        student: Student,
        prompts: PromptSet,
        evaluator: Evaluator,
        journal: Journal,
        checkpoints: Checkpoints,
        should_stop: Callable[[], bool],
        resume_from: Path | None = None,
    ) -> None:
        self.config = config
        self.student = student
        self.prompts = prompts
        self.evaluator = evaluator
        self.journal = journal
        self.checkpoints = checkpoints
        self.should_stop = should_stop
        self.optimizer = Optimizer(student, config)
        self.progress = RunProgress(seed=config.seed)
        self.stopped = False
        self._saved_step: int | None = None
        self._skipped = 0
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._evaluation_seconds = 0.0
        self._validation: tuple[int, float] | None = None
        if resume_from:
            self._resume(resume_from)
        self._elapsed_before = self.progress.seconds_elapsed
        self._started = time.perf_counter()

    def __iter__(self) -> Iterator[Step]:
        """Steps in order. Before the first one the untrained student is evaluated, as step 0."""
        if self.progress.step == 0:
            self._evaluate()
        while self.progress.step < self.config.num_steps:
            if self.should_stop():
                self.stop()
                return
            step = self._next_step()
            started = time.perf_counter()
            yield step
            self._finish(step, time.perf_counter() - started)

    def upcoming(self, count: int) -> list[Prompt]:
        """The prompts of the present step and of those after it, at most `count` and not past the run's end."""
        each = self.config.batch_size * self.config.gradient_accumulation_steps
        left = (self.config.num_steps - self.progress.step) * each
        return self.prompts.take(self.progress.cursor, min(max(count, each), left))

    def stop(self) -> None:
        """End the run early, with a checkpoint of the last complete step."""
        self.stopped = True
        if self._saved_step != self.progress.step:
            self._save_step()

    def conclude(self) -> Path:
        """Write `final/` and copy it to the output path. Returns the folder of the final adapter."""
        path = self.checkpoints.save_named("final", self.student.save_adapter)
        self.journal.checkpoint(self.progress.step, path, is_final=True, validation_kl=self._validation_kl)
        if self.config.output_adapter_path:
            copy_adapter(path, Path(self.config.output_adapter_path))
        return path

    @property
    def seconds_elapsed(self) -> float:
        """Seconds the run has worked, over all its attempts."""
        return self._elapsed_before + time.perf_counter() - self._started

    @property
    def seconds_remaining(self) -> float:
        """Estimate from the median of the recent steps and the last evaluation."""
        done, total = self.progress.step, self.config.num_steps
        evaluations = sum(self._evaluates_at(step) for step in range(done + 1, total + 1))
        return (total - done) * median(self._step_seconds) + evaluations * self._evaluation_seconds

    def _resume(self, path: Path) -> None:
        self.progress = read_progress(path)
        self.student.load_adapter(path / "adapters.safetensors")
        self.optimizer.load(path / OPTIMIZER)
        self._saved_step = self.progress.step
        self.journal.forget_after(self.progress.step)
        self.journal.log(f"resumed after step {self.progress.step}")

    def _next_step(self) -> Step:
        number = self.progress.step + 1
        count = self.config.batch_size * self.config.gradient_accumulation_steps
        seed = step_seed(self.config.seed, number)
        mx.random.seed(seed)
        return Step(
            number,
            self.prompts.take(self.progress.cursor, count),
            seed,
            optimizer=self.optimizer,
            journal=self.journal,
            should_stop=self.should_stop,
            shows_sample=number == 1 or self._evaluates_at(number),
        )

    def _finish(self, step: Step, seconds: float) -> None:
        if not step.updated:
            raise OpdError(Reason.INTERNAL, f"the trainer left step {step.number} without step.update()")
        self._step_seconds.append(seconds)
        cursor = self.progress.cursor + len(step.prompts)
        self.progress = replace(self.progress, step=step.number, cursor=cursor, seconds_elapsed=self.seconds_elapsed)
        if step.finite:
            self._skipped = 0
            self._report(step, seconds)
        else:
            self._skip(step)
        if self._evaluates_at(step.number):
            self._evaluate()
        if self._saves_at(step.number):
            self._save_step()

    def _report(self, step: Step, seconds: float) -> None:
        times = StepTimes(step.phases, 1000.0 * seconds, self.seconds_elapsed, self.seconds_remaining)
        metrics = step_metrics(
            step=step.number,
            total_steps=self.config.num_steps,
            record=step.record,
            temperature=self.config.temperature,
            learning_rate=learning_rate(step.number, self.config),
            grad_norm=step.grad_norm,
            times=times,
            memory=read_memory(),
        )
        self.journal.metrics(metrics)

    def _skip(self, step: Step) -> None:
        self._skipped += 1
        found = f"loss {step.record.loss}, gradient norm {step.grad_norm}"
        if self._skipped > SKIPS_ALLOWED:
            message = (
                f"{self._skipped} steps in a row gave no number (step {step.number}: {found}); "
                "resume with a lower learning_rate or mixed_precision false"
            )
            raise OpdError(Reason.NOT_A_NUMBER, message, step=step.number)
        self.journal.log(f"step {step.number} left out: {found}", "warning")

    def _evaluates_at(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.num_steps

    def _evaluate(self) -> None:
        self._measure()
        if self.progress.step in (0, self.config.num_steps):
            for answer in self.evaluator.student_answers():
                self.journal.sample(self.progress.step, answer)

    def _measure(self) -> None:
        metrics = self.evaluator.measure(self.progress.step)
        # The first one also waits for the teacher to write its completions.
        self._evaluation_seconds = min(metrics.seconds, self._evaluation_seconds or metrics.seconds)
        validation_kl = getattr(metrics, self.config.divergence)
        if not math.isfinite(validation_kl):
            raise OpdError(Reason.NOT_A_NUMBER, f"validation KL at step {metrics.step} is {validation_kl}")
        self._validation = (metrics.step, validation_kl)
        best = self.progress.best_kl
        if self.progress.step == 0 or (best is not None and validation_kl >= best):
            self.journal.evaluation(metrics)
            return
        self.progress = replace(self.progress, best_kl=validation_kl, best_step=self.progress.step)
        path = self.checkpoints.save_named("best", self.student.save_adapter)
        self.journal.evaluation(replace(metrics, is_best=True, checkpoint_path=str(path)))
        self.journal.checkpoint(metrics.step, path, is_best=True, validation_kl=validation_kl)

    def _saves_at(self, step: int) -> bool:
        if step % self.config.checkpoint_every == 0:
            return True
        soon = max(1, math.ceil(FIRST_CHECKPOINT_FRACTION * self.config.num_steps))
        waited = self.seconds_elapsed - self._elapsed_before >= FIRST_CHECKPOINT_SECONDS
        return self._saved_step is None and (step >= soon or waited)

    def _save_step(self) -> None:
        path = self.checkpoints.save_step(self.progress, self._save)
        self._saved_step = self.progress.step
        self.journal.checkpoint(self.progress.step, path, validation_kl=self._validation_kl)

    @property
    def _validation_kl(self) -> float | None:
        return self._validation[1] if self._validation and self._validation[0] == self.progress.step else None

    def _save(self, folder: Path) -> None:
        self.student.save_adapter(folder)
        self.optimizer.save(folder / OPTIMIZER)
