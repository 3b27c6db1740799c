"""A decoding step on a CPU: ours, MLX's, and the least it takes, numpy's bare products of all weights, in one run.

    python bench/decoding.py [--model FOLDER] [--rounds 12]

The student with a LoRA of rank 16 on every linear layer, 32 positions in the cache. The products take the same weights
in order, without adapter, attention or norms: once as a single numpy product each, once by two threads of ours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from opd_daemon.config import LoraConfig
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill.student import Student
from opd_daemon.models.hands import Array, Hands

SEQUENCES, KNOWN, RANK, SPUN = (1, 2, 4, 8, 16, 32), 32, 16, 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an mlx-lm folder; default: the demo's student")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or make_student(
            convert_teacher(Path(folder) / "teacher", print), Path(folder) / "student", print
        )
        student = Student.load(path, None, LoraConfig(rank=RANK), seed=0, float32=True)
    weights = _weights(student)
    size = sum(array.nbytes for array in weights)
    print(f"{size / 1e6:.0f} MB of weights; milliseconds, medians\n")
    print("sequences   MLX's step   our step   products, numpy   products, two threads   ours / numpy's products")
    for rows in SEQUENCES:
        theirs, ours, plain, by_hands = _medians(_ways(student, weights, rows), arguments.rounds)
        figures = f"{rows:9}{theirs:13.1f}{ours:11.1f}{plain:18.1f}{by_hands:24.1f}{ours / plain:26.2f} x"
        print(f"{figures}   ({size / by_hands / 1e6:.1f} GB/s)")


def _weights(student: Student) -> list[Array]:
    """Matrices in the order of their use."""
    found = []
    for layer in student.model.layers:
        for block, names in ((layer.self_attn, ("q", "k", "v", "o")), (layer.mlp, ("gate", "up", "down"))):
            layers = [block[f"{name}_proj"] for name in names]
            found += [np.asarray(getattr(linear, "linear", linear).weight) for linear in layers]
    return [*found, np.asarray(student.model.model.embed_tokens.weight)]


def _ways(student: Student, weights: list[Array], rows: int) -> tuple[Callable[[], object], ...]:
    generator = np.random.default_rng(rows)
    states = {width: generator.standard_normal((width, rows), np.float32) for width in {w.shape[1] for w in weights}}
    results = {height: np.empty((height, rows), np.float32) for height in {len(w) for w in weights}}
    tokens, hands = mx.ones((rows, 1), mx.int32), Hands()
    caches = [[BatchKVCache([0] * rows) for _ in student.model.layers] for _ in range(2)]
    for cache in caches:
        mx.eval(student.model(mx.ones((rows, KNOWN), mx.int32), cache=cache))

    def plain() -> None:
        for array in weights:
            np.matmul(array, states[array.shape[1]], out=results[len(array)])

    def by_hands() -> None:
        for array in weights:
            hands.multiply([(array, states[array.shape[1]], results[len(array)])], lambda: None)

    return (
        lambda: mx.eval(student.model(tokens, cache=caches[0])),
        lambda: mx.eval(student.decoder(tokens, caches[1])),
        plain,
        by_hands,
    )


def _medians(ways: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Milliseconds of each way, one after the other: a BLAS's threads spin for a while, and whoever comes next pays.

    The first rounds, in which they may still spin, don't count.
    """
    found: list[list[float]] = [[] for _ in ways]
    for way, times in zip(ways, found, strict=True):
        for _ in range(rounds + SPUN):
            started = time.perf_counter()
            way()
            times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times[SPUN:]) for times in found]


if __name__ == "__main__":
    main()
