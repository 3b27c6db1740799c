"""What a training step costs against mlx-lm's own: time and memory, each variant in a process of its own.

    python bench/student_step.py [--rounds 5] [--sequences 4] [--length 128]

The step is forward, loss, backward and update of a LoRA (rank 16, every linear layer) on SmolLM2-135M in float32, on
the same tokens for all; a quarter of each sequence is prompt. mlx-lm's step is `mlx_lm.tuner.trainer.train` itself:
cross-entropy, compiled, no gradient checkpoint. Ours has the teacher's signal at hand, and is measured with exact
reverse KL over the whole vocabulary and with cross-entropy alone, for each mode of `backward`. Memory is MLX's peak
less what was there before the first step (weights, adapter and optimizer; the teacher's head).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx import optimizers
from mlx_lm.tuner import trainer

from opd_daemon.config import LoraConfig, RunConfig, parse_config
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill.batches import MicroBatch, pack
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import gradient
from opd_daemon.distill.memory import limit_memory
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.optimizer import Optimizer, clipped
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import TeacherTargets
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.trainer import TeacherHead

LORA = LoraConfig(rank=16)
MIB = 1 << 20
OURS = {"exact reverse KL": {"kl_weight": 1.0, "ce_weight": 0.0}, "cross-entropy": {"kl_weight": 0.0, "ce_weight": 1.0}}
MODES = ("auto", "checkpoint", "layerwise")


def main() -> None:
    """Measure every variant and print times and memory beside mlx-lm's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where the two models are, or are put; default: a temporary folder")
    parser.add_argument("--only", nargs=2, metavar=("LOSS", "MODE"), help="measure one variant and print it as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(_measure(arguments, *arguments.only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = arguments.folder or Path(folder)
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    make_student(convert_teacher(arguments.folder / "smollm2", print), arguments.folder / "smollm2-3bit", print)
    print(f"{arguments.sequences} sequences of {arguments.length} tokens, medians of {arguments.rounds} steps")
    print(f"{'loss':18} {'backward':11} {'seconds':>8} {'MiB':>6}   time    memory  against mlx-lm")
    theirs = _in_process(arguments, "cross-entropy", "mlx-lm")
    print(f"{'cross-entropy':18} {'mlx-lm':11} {theirs['seconds']:8.2f} {theirs['bytes'] / MIB:6.0f}")
    for loss in OURS:
        for mode in MODES:
            ours = _in_process(arguments, loss, mode)
            ratios = f"× {ours['seconds'] / theirs['seconds']:.2f}  × {ours['bytes'] / theirs['bytes']:.2f}"
            print(f"{loss:18} {mode:11} {ours['seconds']:8.2f} {ours['bytes'] / MIB:6.0f}   {ratios}", flush=True)


def _in_process(arguments: argparse.Namespace, loss: str, mode: str) -> dict[str, float]:
    options = {name: str(getattr(arguments, name)) for name in ("rounds", "sequences", "length", "folder")}
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, __file__, *given, "--only", loss, mode]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(arguments: argparse.Namespace, loss: str, mode: str) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(100, 40_000, (arguments.sequences, arguments.length), dtype=np.int32)
    if mode == "mlx-lm":
        return _theirs(arguments, tokens)
    return _ours(arguments, tokens, loss, mode)


def _theirs(arguments: argparse.Namespace, tokens: Any) -> dict[str, float]:
    """Steps of mlx-lm's trainer: it asks for a batch between two of them, which gives their times."""
    student = Student.load(arguments.folder / "smollm2-3bit", None, LORA, seed=0, float32=True)
    model, _ = mlx_lm.load(str(arguments.folder / "smollm2-3bit"))  # without what opd does to a student
    model.freeze()
    mlx_lm.tuner.utils.linear_to_lora_layers(model, -1, student.adapter.lora_parameters)
    del student
    count, length = tokens.shape
    batch = mx.array(np.concatenate([tokens, np.zeros((count, 1), dtype=np.int32)], axis=1))
    lengths = mx.array([[length // 4, length - 1]] * count)
    optimizer = optimizers.AdamW(1e-5)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    before, times = _start(), []

    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        while True:
            times.append(time.perf_counter())
            yield batch, lengths

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        settings = trainer.TrainingArgs(
            iters=arguments.rounds + 2,
            steps_per_report=1000,
            steps_per_save=1000,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        trainer.train(model, optimizer, [None], args=settings, iterate_batches=batches)
    return _found(np.diff(times), before)


def _ours(arguments: argparse.Namespace, tokens: Any, loss: str, mode: str) -> dict[str, float]:
    student = Student.load(arguments.folder / "smollm2-3bit", None, LORA, seed=0, float32=True)
    limit_memory()
    config = _config(OURS[loss], mode)
    batch, head = _batch(arguments.folder / "smollm2", tokens, student, exact="reverse" in loss)
    objective = Objective.from_config(config, head=lambda: cast("HeadMatrix", head))
    optimizer = Optimizer(student, config)
    before, times = _start(), []
    for step in range(1, arguments.rounds + 3):
        started = time.perf_counter()
        result = gradient(student, batch, objective, config.backward)
        clip, _ = clipped(result.gradients, config.max_grad_norm)
        optimizer.update(clip, step)
        times.append(time.perf_counter() - started)
        del result, clip
    return _found(times, before)


def _start() -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def _found(times: Any, before: int) -> dict[str, float]:
    """The first two steps compile and fill caches."""
    return {"seconds": statistics.median(times[2:]), "bytes": mx.get_peak_memory() - before}


def _config(weights: dict[str, float], mode: str) -> RunConfig:
    paths = {"base_model_path": "student", "teacher_model_path": "teacher", "prompts_path": "prompts"}
    return parse_config({**paths, **weights, "backward": mode, "temperature": 1.0, "signal": "exact"})


def _batch(teacher: Path, tokens: Any, student: Student, *, exact: bool) -> tuple[MicroBatch, HeadMatrix | None]:
    """The micro-batch with the teacher's states, and the teacher's head."""
    asked = tokens.shape[1] // 4
    rollouts = [
        Rollout(Prompt(index, "", tuple(line[:asked])), tuple(line[asked:]), stopped="length", source="data")
        for index, line in enumerate(tokens.tolist())
    ]
    if not exact:
        return pack(rollouts, [TeacherTargets()] * len(rollouts), 1.0, "completion"), None
    model, _ = mlx_lm.load(str(teacher))
    hidden = np.array(model.model(mx.array(tokens)))[:, asked - 1 : -1]
    weight = TeacherHead({"weight": np.array(model.model.embed_tokens.weight)}, {"weight": "float32"})
    targets = [TeacherTargets(hidden=states) for states in hidden]
    return pack(rollouts, targets, 1.0, "completion"), HeadMatrix(weight, student.vocabulary)


if __name__ == "__main__":
    main()
