"""Rollouts of two steps sampled together: half the decoding, and the teacher scores the second half during training."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from opd_daemon.distill import Rollout, Step, TeacherTargets, load_rollouts, save_rollouts, score
from opd_daemon.trainer import TrainContext
from opd_trainers.options import OnPolicyOptions
from opd_trainers.sampling import sample

PENDING = "pending_rollouts.safetensors"

Pending = tuple[list[Rollout], Future[list[TeacherTargets]]]


class OneAhead:
    """Rollouts of a step and of the one after it, sampled by one student: every second step's are an update old.

    Decoding costs nearly the same for twice the sequences. Only the calls to the teacher run beside the training;
    whatever needs MLX stays in the trainer's own thread. What was sampled by a student that an update has changed since
    can't be sampled again, so checkpoints keep it.
    """

    def __init__(self, context: TrainContext, options: OnPolicyOptions) -> None:
        self.context = context
        self.options = options
        self.caller = ThreadPoolExecutor(1, thread_name_prefix="score")
        self.pending: dict[int, Pending] = {}

    def __enter__(self) -> Self:
        self.context.loop.keep_beside = self._save
        saved = self.context.resume_from and self.context.resume_from / PENDING
        if saved and saved.is_file():
            prompts = {prompt.index: prompt for prompt in self.context.prompts.train}
            self._ask(self.context.loop.progress.step + 1, load_rollouts(saved, prompts))
        return self

    def __exit__(self, _: type[BaseException] | None, fault: BaseException | None, __: TracebackType | None) -> None:
        # The loop may still write a checkpoint after this: it keeps what is pending.
        self.caller.shutdown(wait=fault is None, cancel_futures=True)

    def take(self, step: Step) -> Pending:
        """The rollouts of this step and the teacher's coming answer."""
        for done in [number for number in self.pending if number < step.number]:
            del self.pending[done]
        if step.number not in self.pending:
            self._sample(step)
        return self.pending[step.number]

    def _sample(self, step: Step) -> None:
        """Sample for this step and the next one, together."""
        prompts = self.context.loop.upcoming(2 * len(step.prompts))
        repeated = [prompt for prompt in prompts for _ in range(self.options.samples_per_prompt)]
        rollouts = sample(self.context, self.options, repeated, seed=step.seed, version=step.number - 1)
        each = len(step.prompts) * self.options.samples_per_prompt
        for place in range(0, len(rollouts), each):
            self._ask(step.number + place // each, rollouts[place : place + each])

    def _ask(self, number: int, rollouts: list[Rollout]) -> None:
        self.pending[number] = rollouts, self.caller.submit(score, self.context, rollouts)

    def _save(self, folder: Path) -> None:
        pending = self.pending.get(self.context.loop.progress.step + 1)
        if pending:
            save_rollouts(folder / PENDING, pending[0])
