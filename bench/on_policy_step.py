"""An on-policy step through the trainer and a live daemon, against the sum of its bare parts, in one run.

    python bench/on_policy_step.py [--teacher FOLDER] [--student FOLDER] [--rounds 5]

Eight sequences of up to 48 new tokens, exact reverse KL, LoRA on every linear layer. The step is the whole of it: with
prompts drawn, rollouts logged, the teacher asked over the daemon's socket, metrics and gauges written. The bare parts
are made of the same rollouts right after it: `sample_completions`; a plain batched forward of the teacher's weights in
this process; forward, loss and backward of the student and the optimizer's update. The learning rate is so small that
the student stays the same, so its rollouts do. Medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from opd_trainers import opd_trainers
from opd_trainers.on_policy import OnPolicy
from stepwise import Timed, run_timed, write_prompts

from opd_daemon.client import LocalDaemon, RemoteTeacher
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill import Rollout, Step, TeacherTargets, backward, micro_batches, sample_completions
from opd_daemon.distill.batches import pad
from opd_daemon.distill.optimizer import Optimizer, clipped
from opd_daemon.home import Home
from opd_daemon.teacher.folder import open_folder
from opd_daemon.teacher.loading import load
from opd_daemon.trainer import TrainContext

BATCH, ACCUMULATION, TOKENS = 4, 2, 48


class Parts:
    """The three parts of a step without anything around them, timed after each step."""

    def __init__(self, teacher: Path, vocab_size: int) -> None:
        self._body = load(open_folder(str(teacher)), vocab_size, lambda _: None).parts.body
        self._optimizer: Optimizer | None = None
        self.steps: list[float] = []
        self.seconds: dict[str, list[float]] = {"rollout": [], "score": [], "train": []}

    def between(self, context: TrainContext, step: Step, seconds: float) -> None:
        """Note the step's seconds, then do its parts again."""
        self._optimizer = self._optimizer or Optimizer(context.student, context.config)
        started = time.perf_counter()
        rollouts = sample_completions(context.student, step.prompts, max_tokens=TOKENS, temperature=1.0, seed=step.seed)
        sampled = time.perf_counter()
        targets = self._targets(rollouts)
        scored = time.perf_counter()
        self._train(context, step, rollouts, targets)
        self.seconds["train"].append(time.perf_counter() - scored)
        self.seconds["score"].append(scored - sampled)
        self.seconds["rollout"].append(sampled - started)
        self.steps.append(seconds)

    def _targets(self, rollouts: list[Rollout]) -> list[TeacherTargets]:
        tokens, places = pad(rollouts)
        states = self._body(tokens)
        rows = np.array(states.reshape(-1, states.shape[-1])[places])
        ends = np.cumsum([len(rollout.completion_ids) for rollout in rollouts])
        return [TeacherTargets(hidden=part) for part in np.split(rows, ends[:-1])]

    def _train(self, context: TrainContext, step: Step, rollouts: list[Rollout], targets: list[TeacherTargets]) -> None:
        assert self._optimizer is not None
        total, count = None, 0.0
        for batch in micro_batches(context, rollouts, targets, labels="teacher"):
            found = backward(context, batch)
            total = found.gradients if total is None else tree_map(mx.add, total, found.gradients)
            count += found.count
        gradients, _ = clipped(tree_map(lambda gradient: gradient / count, total), 1.0)
        self._optimizer.update(gradients, step.number)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="an mlx-lm folder; default: the demo's teacher")
    parser.add_argument("--student", type=Path, help="an mlx-lm folder; default: the demo's student")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = arguments.teacher or convert_teacher(folder / "teacher", print)
        student = arguments.student or make_student(teacher, folder / "student", print)
        with LocalDaemon(Home(folder / "home")) as daemon, daemon.client() as client:
            for _ in client.load_teacher(str(teacher)):
                pass
            remote = RemoteTeacher(client)
            parts = Parts(teacher, remote.info.vocab_size)
            _run(folder, teacher, student, remote, parts, rounds=arguments.rounds)
    _show(parts)


def _run(folder: Path, teacher: Path, student: Path, remote: RemoteTeacher, parts: Parts, *, rounds: int) -> None:
    # One to warm up, and the last one, which ends in an evaluation.
    steps = rounds + 2
    train, held_out = write_prompts(folder, steps * BATCH * ACCUMULATION)
    values = {
        "trainer": "on_policy",
        "teacher_model_path": str(teacher),
        "base_model_path": str(student),
        "prompts_path": str(train),
        "validation_prompts_path": str(held_out),
        "num_steps": steps,
        "batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-12,
        "divergence": "reverse_kl",
        "temperature": 1.0,
        "kl_weight": 1.0,
        "ce_weight": 0.0,
        "max_generation_tokens": TOKENS,
        "max_eval_samples": 0,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
    }
    info = {info.name: info for info in opd_trainers()}["on_policy"]
    run_timed(folder, values, info, Timed(OnPolicy(), lambda _context, _step: None, parts.between), remote)


def _show(parts: Parts) -> None:
    step = statistics.median(parts.steps[1:])
    sums = [sum(times) for times in zip(*parts.seconds.values(), strict=True)]
    for name, seconds in parts.seconds.items():
        print(f"bare {name:<10}{1000 * statistics.median(seconds[1:]):9.0f} ms")
    print(f"{'bare parts':<15}{1000 * statistics.median(sums[1:]):9.0f} ms")
    print(f"{'whole step':<15}{1000 * step:9.0f} ms")
    ratios = [whole / bare for whole, bare in zip(parts.steps[1:], sums[1:], strict=True)]
    print(f"{'ratio':<15}{statistics.median(ratios):9.3f}      aim 1.05 or less; of each step to its own parts")


if __name__ == "__main__":
    main()
