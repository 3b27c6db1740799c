"""The run around a trainer's steps: schedule, evaluation, checkpoints, metrics, stopping and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from opd_daemon.config import RunConfig
from opd_daemon.distill.checkpoints import OPTIMIZER, Checkpoints, RunProgress, copy_adapter, read_progress
from opd_daemon.distill.data import Prompt, PromptSet
from opd_daemon.distill.evaluation import Evaluator
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.memory import memory_pressure, read_memory
from opd_daemon.distill.metrics import StepTimes, step_metrics
from opd_daemon.distill.model_card import CardFacts
from opd_daemon.distill.optimizer import Optimizer, learning_rate
from opd_daemon.distill.pace import Pace
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.step import Step, step_seed
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import EvaluationMetrics

FIRST_CHECKPOINT_FRACTION = 0.05
FIRST_CHECKPOINT_SECONDS = 60.0
SKIPS_ALLOWED = 2
IDLE_ALLOWED = 9


class TrainingLoop:
    """Yields the steps still to do, and does around each of them everything that isn't the method itself.

    `progress` says where the run stands; `stopped` is true once it ended because someone asked for it. A trainer may
    set `samples_per_prompt`, so that a step takes fewer prompts for the same number of sequences, and `keep_beside`,
    which writes into a checkpoint's folder what the trainer needs besides to go on from it.
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
        self.samples_per_prompt = 1
        self.keep_beside: Callable[[Path], None] | None = None
        self._saved_step: int | None = None
        self._step: Step | None = None
        self._pace = Pace()
        self._warned_of_pressure = False
        self._prompts_made = 0
        self._makes_ahead = False
        if resume_from:
            self._resume(resume_from)
        else:
            self._forget_after(-1)  # an attempt that ended before its first checkpoint may have left rows
        self._elapsed_before = self.progress.seconds_elapsed
        self._started = time.perf_counter()

    def __iter__(self) -> Iterator[Step]:
        """Steps in order. Before the first one the untrained student is evaluated, as step 0."""
        if self._evaluates_at(self.progress.step) and self.progress.evaluated_step != self.progress.step:
            self._evaluate()
        while self.progress.step < self.config.num_steps and not self._gave_up(self.progress):
            if self.should_stop():
                self.stop()
                return
            step = self._step = self._next_step()
            started = time.perf_counter()
            yield step
            self._finish(step, time.perf_counter() - started)

    @property
    def _prompts_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps // self.samples_per_prompt

    def upcoming(self, count: int) -> list[Prompt]:
        """The prompts of the present step and of those after it, at most `count` and not past the run's end."""
        each = self._prompts_per_step
        left = (self.config.num_steps - self.progress.step) * each
        self._prompts_made = min(max(count, each), left)
        return self.prompts.take(self.progress.cursor, self._prompts_made)

    def stop(self) -> None:
        """End the run early, with a checkpoint of the last complete step."""
        self.stopped = True
        if self._saved_step != self.progress.step and not self._updating:
            self._save_step()

    def rescue(self) -> bool:
        """After a failure: a checkpoint of the last complete step, where the student still is as that step left it.

        False when an update was under way; then an older one has to do.
        """
        if self._updating or self.progress.step in (0, self._saved_step):
            return False
        self._save_step()
        return True

    def conclude(self) -> Path:
        """Write `final/`, and copy it or `best/` to the output path. Returns the folder of the final adapter."""
        path = self.checkpoints.save_named("final", self._save_finished())
        self.journal.checkpoint(self.progress.step, path, is_final=True, validation_kl=self._validation_kl)
        if self.config.output_adapter_path:
            copy_adapter(self._result(path), Path(self.config.output_adapter_path))
        return path

    def _result(self, final: Path) -> Path:
        """The adapter for the output path: the best where the configuration prefers it to the last, else the final."""
        progress = self.progress
        prefers_best = self.config.save_best_only or self._gave_up(progress)
        if not prefers_best or progress.best_step in (None, progress.step):
            return final
        best = f"the best adapter, of step {progress.best_step} with a validation KL of {progress.best_kl:.4f}"
        self.journal.log(f"{self.config.output_adapter_path} gets {best}, not the final one of step {progress.step}")
        return self.checkpoints.folder / "best"

    @property
    def seconds_elapsed(self) -> float:
        """Seconds the run has worked, over all its attempts."""
        return self._elapsed_before + time.perf_counter() - self._started

    @property
    def seconds_remaining(self) -> float:
        """Estimate from the recent steps and the evaluations."""
        done, total, every = self.progress.step, self.config.num_steps, self.config.eval_every
        evaluations = -(-total // every) - done // every if done < total else 0
        evaluations += self._evaluates_at(done) and self.progress.evaluated_step != done
        return self._pace.seconds(total - done, self._rollouts_remaining, evaluations)

    @property
    def _rollouts_remaining(self) -> int:
        """Steps that still need new completions: all, unless they are made ahead and then kept for later epochs."""
        left = self.config.num_steps - self.progress.step - self._pace.steps_ahead
        if not self._makes_ahead or self.evaluator.on_policy:
            return left
        each = self._prompts_per_step
        made = self.progress.cursor + self._pace.steps_ahead * each
        return min(left, -(-max(0, len(self.prompts.train) - made) // each))

    def _resume(self, path: Path) -> None:
        self.progress = read_progress(path)
        self.student.load_adapter(path / "adapters.safetensors")
        self.optimizer.load(path / OPTIMIZER)
        self._saved_step = self.progress.step
        self._forget_after(self.progress.step)
        self.journal.log(f"resumed after step {self.progress.step}")
        # The worker may have died before it could tell.
        self.journal.checkpoint(self.progress.step, path, validation_kl=self._validation_kl)

    def _forget_after(self, step: int) -> None:
        self.checkpoints.forget_after(step)
        self.journal.forget_after(step)

    def _next_step(self) -> Step:
        number = self.progress.step + 1
        count = self._prompts_per_step
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
        self._measure_pace(step, seconds)
        cursor = self.progress.cursor + len(step.prompts)
        self.progress = replace(self.progress, step=step.number, cursor=cursor, seconds_elapsed=self.seconds_elapsed)
        if step.finite:
            idle = self.progress.idle_steps + 1 if step.idle else 0
            self.progress = replace(self.progress, skipped_steps=0, idle_steps=idle)
            self._report(step, seconds)
            if idle:
                self._warn_of_masks(step, idle)
        else:
            self._skip(step)
        self._warn_of_pressure()
        if self._evaluates_at(step.number):
            self._evaluate()
        if self._saves_at(step.number):
            self._save_step()

    def _report(self, step: Step, seconds: float) -> None:
        times = StepTimes(step.phases, step.peaks, 1000.0 * seconds, self.seconds_elapsed, self.seconds_remaining)
        memory = read_memory()
        metrics = step_metrics(
            step=step.number,
            total_steps=self.config.num_steps,
            record=step.record,
            temperature=self.config.temperature,
            learning_rate=learning_rate(step.number, self.config),
            grad_norm=step.grad_norm,
            times=times,
            memory=replace(memory, peak_bytes=max(memory.peak_bytes, step.peak_bytes)),
        )
        self.journal.metrics(metrics)

    def _warn_of_pressure(self) -> None:
        """Say once that memory runs short."""
        if not self._warned_of_pressure and (warning := memory_pressure()):
            self._warned_of_pressure = True
            self.journal.log(warning, "warning")

    def _skip(self, step: Step) -> None:
        skipped = self.progress.skipped_steps + 1
        self.progress = replace(self.progress, skipped_steps=skipped)
        found = f"loss {step.record.loss}, gradient norm {step.grad_norm}"
        if skipped > SKIPS_ALLOWED:
            message = (
                f"{skipped} steps in a row gave no number (step {step.number}: {found}); "
                "resume with a lower learning_rate or mixed_precision false"
            )
            raise OpdError(Reason.NOT_A_NUMBER, message, step=step.number)
        self.journal.log(f"step {step.number} left out: {found}", "warning")

    def _warn_of_masks(self, step: Step, idle: int) -> None:
        """After `idle` steps in a row all of whose completions were masked; many are a run that learns nothing."""
        cure = "raise max_generation_tokens, or train without the mask"
        if idle > IDLE_ALLOWED:
            message = f"nothing was learned in {idle} steps in a row, as every completion was masked: {cure}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, step=step.number)
        why = "every completion is masked, as cut off or as repeating itself"
        self.journal.log(f"step {step.number} learned nothing: {why}; {cure}", "warning")

    def _measure_pace(self, step: Step, seconds: float) -> None:
        made, self._prompts_made = self._prompts_made, 0
        self._makes_ahead = self._makes_ahead or made > len(step.prompts)
        self._pace.step(seconds, step.phases.get("rollout", 0.0) / 1000.0, -(-made // len(step.prompts)))

    def _evaluates_at(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.num_steps

    def _evaluate(self) -> None:
        """Measure, then write it down; only then `progress` counts it, so that one cut short is made again."""
        step = self.progress.step
        metrics = self.evaluator.measure(step)
        self._pace.evaluation(metrics.seconds - self.evaluator.once_seconds)
        progress = self._judged(metrics)
        answers: list[Rollout] = []
        if step in {0, self.config.num_steps} or self._gave_up(progress):
            metrics = replace(metrics, tasks=self._task_scores())
            answers = [*self.evaluator.student_answers(), *(self.evaluator.teacher_answers() if step == 0 else ())]
        if progress.best_step == step:
            path = self.checkpoints.save_named("best", self._save_finished(metrics))
            metrics = replace(metrics, is_best=True, checkpoint_path=str(path))
        self.journal.evaluation(metrics, self.evaluator.table)
        if metrics.is_best:
            self.journal.checkpoint(step, Path(metrics.checkpoint_path), is_best=True, validation_kl=progress.best_kl)
        for answer in answers:
            self.journal.sample(step, answer)
        self.progress = progress
        if self._gave_up(progress):
            waited = f"{progress.evaluations_since_best} evaluations without improvement"
            best = f"the best, of step {progress.best_step}, had a validation KL of {progress.best_kl:.4f}"
            self.journal.log(f"ended early after step {step}: {waited}; {best}")

    def _judged(self, metrics: EvaluationMetrics) -> RunProgress:
        """Where the run stands with this evaluation. The untrained student is nobody's best."""
        step, validation_kl = metrics.step, metrics.validation_kl
        if validation_kl is None or not math.isfinite(validation_kl):
            raise OpdError(Reason.NOT_A_NUMBER, f"validation KL at step {step} is {validation_kl}")
        progress = replace(self.progress, evaluated_step=step, validation_kl=validation_kl)
        if step == 0:
            return progress
        if progress.best_kl is None or validation_kl < progress.best_kl:
            return replace(progress, best_kl=validation_kl, best_step=step, evaluations_since_best=0)
        return replace(progress, evaluations_since_best=progress.evaluations_since_best + 1)

    def _gave_up(self, progress: RunProgress) -> bool:
        return 0 < self.config.early_stop_patience <= progress.evaluations_since_best

    def _task_scores(self) -> dict[str, float]:
        """Scores of `eval_tasks`. A fault is the run's end before the first step, and a warning after the last."""
        try:
            return self.evaluator.tasks()
        except OpdError as fault:
            if self.progress.step == 0:
                raise
            self.journal.log(str(fault), "warning")
            return {}

    def _saves_at(self, step: int) -> bool:
        if step % self.config.checkpoint_every == 0:
            return True
        soon = max(1, math.ceil(FIRST_CHECKPOINT_FRACTION * self.config.num_steps))
        waited = self.seconds_elapsed - self._elapsed_before >= FIRST_CHECKPOINT_SECONDS
        return self._saved_step is None and (step >= soon or waited)

    def _save_step(self) -> None:
        self.journal.settle()
        path = self.checkpoints.save_step(self.progress, self._save)
        self._saved_step = self.progress.step
        self.journal.checkpoint(self.progress.step, path, validation_kl=self._validation_kl)

    @property
    def _validation_kl(self) -> float | None:
        return self.progress.validation_kl if self.progress.evaluated_step == self.progress.step else None

    @property
    def _updating(self) -> bool:
        """Whether the student has left the last complete step behind."""
        return self._step is not None and self._step.began_update and self._step.number > self.progress.step

    def _save_finished(self, after: EvaluationMetrics | None = None) -> Callable[[Path], None]:
        """What writes the adapter as others will use it, with its card; after: the evaluation of this step."""
        facts = CardFacts.of_run(
            self.config,
            self.journal.folders,
            self.evaluator.teacher.info,
            step=self.progress.step,
            base_digest=self.student.first_digest,
            after=after,
        )
        return partial(self.student.save_adapter, card=facts)

    def _save(self, folder: Path) -> None:
        self.student.save_adapter(folder)
        self.optimizer.save(folder / OPTIMIZER)
        if self.keep_beside:
            self.keep_beside(folder)
