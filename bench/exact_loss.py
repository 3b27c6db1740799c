"""Memory and time of the exact reverse KL with its gradient, against plain autodiff over all logits.

    python bench/exact_loss.py [--rows 512] [--student-hidden 896] [--teacher-hidden 1536] [--rounds 3]

Both are given hidden states of student and teacher and both heads (float32, vocabulary 152 064, of which the last 399
ids belong to no token) and find the loss and its gradient with respect to the student's states. "naive" is
`mx.value_and_grad` of the formula. "ours" is `distill.head_loss`, which at the same time finds what a training step
reports of every token. Each runs in a process of its own; peaks are what is added to the weights and states, by MLX's
counter and by the process's resident memory, since part of ours is numpy's. How exact each is, is told by the same
formula in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np
from mlx import nn

from opd_daemon.distill import divergences
from opd_daemon.distill.batches import HiddenRows, Rows
from opd_daemon.distill.head_loss import head_gradient
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.memory import limit_memory
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.trainer import TeacherHead

WIDTH, REAL = 152_064, 151_665
MEBIBYTE = 1 << 20
FLOAT64_ROWS = 64


def main() -> None:
    """Measure each variant in its process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--student-hidden", type=int, default=896)
    parser.add_argument("--teacher-hidden", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=("naive", "ours"), help="measure this one here and print it as JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(_measure(arguments)))
        return
    found = {variant: _in_a_process(variant) for variant in ("naive", "ours")}
    _report(arguments, **found)


def _in_a_process(variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    return cast(dict[str, float], json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def _report(arguments: argparse.Namespace, naive: dict[str, float], ours: dict[str, float]) -> None:
    tensor = arguments.rows * WIDTH * 4
    print(
        f"N = {arguments.rows}, V = {WIDTH}, hidden {arguments.student_hidden} and {arguments.teacher_hidden}, float32"
    )
    print(f"one logits tensor     {tensor / MEBIBYTE:8.0f} MiB")
    for name, found in (("naive autodiff", naive), ("ours", ours)):
        counted, resident = (found[key] / tensor for key in ("mlx_bytes", "resident_bytes"))
        print(
            f"{name:<20}  {found['seconds']:8.2f} s    extra peak {counted:6.3f} x by MLX, {resident:6.3f} x resident"
        )
    worst = max(ours["mlx_bytes"], ours["resident_bytes"]) / tensor
    print(f"memory, ours / tensor {worst:8.3f}      aim 0.25 or less")
    print(f"time, ours / naive    {ours['seconds'] / naive['seconds']:8.3f}      aim 0.6 or less")
    print("relative error against float64")
    for name, found in (("naive autodiff", naive), ("ours", ours)):
        print(f"{name:<20}  {found['loss_error']:8.1e} of the loss, {found['slope_error']:8.1e} of the gradient")


@dataclass(frozen=True)
class Task:
    """States and heads of both models."""

    student_states: mx.array
    student_weight: mx.array
    teacher_states: np.ndarray[Any, Any]
    teacher_weight: np.ndarray[Any, Any]
    vocabulary: VocabularyMask
    width: int = WIDTH

    @classmethod
    def random(cls, rows: int, student_hidden: int, teacher_hidden: int) -> Task:
        """Distributions with an entropy of some nats, as language models have."""
        generator = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray[Any, Any]:
            return generator.standard_normal(shape, np.float32)

        return cls(
            mx.array(normal(rows, student_hidden)),
            mx.array(normal(WIDTH, student_hidden) * np.float32(3.0 / student_hidden**0.5)),
            normal(rows, teacher_hidden),
            normal(WIDTH, teacher_hidden) * np.float32(3.0 / teacher_hidden**0.5),
            VocabularyMask(WIDTH, range(REAL, WIDTH)),
        )

    def head(self, states: mx.array) -> mx.array:
        """The student's logits, as `Student.head` gives them."""
        return self.vocabulary(states @ self.student_weight.T)


Loss = Callable[[], tuple[mx.array, mx.array]]


def _naive(task: Task) -> Loss:
    teacher_weight, teacher_states = mx.array(task.teacher_weight), mx.array(task.teacher_states)
    mx.eval(teacher_weight, teacher_states)

    def loss(states: mx.array) -> mx.array:
        student = nn.log_softmax(task.head(states), axis=-1)
        teacher = nn.log_softmax(task.vocabulary(teacher_states @ teacher_weight.T), axis=-1)
        total: mx.array = (mx.exp(student) * (student - teacher)).sum(axis=-1).sum()
        return total

    return lambda: mx.value_and_grad(loss)(task.student_states)


def _ours(task: Task) -> Loss:
    matrix = HeadMatrix(TeacherHead({"weight": task.teacher_weight}, {"weight": "float32"}), task.vocabulary)
    count = len(task.student_states)
    hidden = HiddenRows(task.teacher_states, "float32", np.arange(count))
    rows = Rows(mx.zeros((count,), dtype=mx.int32), mx.ones((count,)), hidden=hidden)
    objective = Objective(divergences.get("reverse_kl"), 1.0, 0.0, lambda: matrix)

    def run() -> tuple[mx.array, mx.array]:
        found = head_gradient(cast(Student, task), task.student_states, rows, objective)
        return found.loss, found.slope

    return run


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    limit_memory()
    task = Task.random(arguments.rows, arguments.student_hidden, arguments.teacher_hidden)
    mx.eval(task.student_states, task.student_weight)
    run = (_naive if arguments.variant == "naive" else _ours)(task)
    mx.eval(task.head(task.student_states[:32]))  # the matrix library takes its own memory at its first product
    mx.clear_cache()
    _forget_resident_peak()
    mx.reset_peak_memory()
    before, resident_before = mx.get_active_memory(), _resident("VmRSS")
    seconds = []
    loss, slope = mx.zeros(()), mx.zeros(())
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        loss, slope = run()
        mx.eval(loss, slope)
        seconds.append(time.perf_counter() - started)
    found = {
        "seconds": statistics.median(seconds),
        "mlx_bytes": mx.get_peak_memory() - before,
        "resident_bytes": _resident("VmHWM") - resident_before,
    }
    exact_loss, exact_slope = _in_float64(task)
    gap = np.linalg.norm(np.array(slope, np.float64) - exact_slope)
    return found | {
        "loss_error": abs(float(loss) / exact_loss - 1),
        "slope_error": float(gap / np.linalg.norm(exact_slope)),
    }


def _in_float64(task: Task) -> tuple[float, np.ndarray[Any, Any]]:
    """Loss and gradient by the formula, some rows at a time."""
    loss, slopes = 0.0, []
    student_weight = np.array(task.student_weight, np.float64)[:REAL]
    teacher_weight = task.teacher_weight[:REAL].astype(np.float64)
    for start in range(0, len(task.teacher_states), FLOAT64_ROWS):
        rows = slice(start, start + FLOAT64_ROWS)
        student = _log_softmax(np.array(task.student_states[rows], np.float64) @ student_weight.T)
        gap = student - _log_softmax(task.teacher_states[rows].astype(np.float64) @ teacher_weight.T)
        mass = np.exp(student)
        kl = (mass * gap).sum(axis=-1, keepdims=True)
        loss += float(kl.sum())
        slopes.append((mass * (gap - kl)) @ student_weight)
    return loss, np.concatenate(slopes)


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def _forget_resident_peak() -> None:
    if (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")


def _resident(name: str) -> float:
    """Resident memory, or its peak, in bytes; not a number where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024.0 * int(line.split()[1])


if __name__ == "__main__":
    main()
