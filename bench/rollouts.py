"""Rollouts: tokens/s of sixteen sampled together, by `opd` and by mlx-lm, against one at a time, in one run.

    python bench/rollouts.py [--model FOLDER] [--rounds 3]

Prompts of 32 tokens are continued by 48 at temperature 1; no id ends a completion, so that all do the same work. One at
a time is mlx-lm's `generate_step`, one sequence of a round. mlx-lm's BatchGenerator samples with a chain of random keys
for each sequence and gives no log-probabilities beyond those it computes itself; ours keeps that of every chosen token.
The ways take turns; medians are compared. Eight samples of one prompt of 512 tokens show what reading it once saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step

from opd_daemon.config import LoraConfig
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.memory import limited_memory
from opd_daemon.distill.rollouts import sample_completions
from opd_daemon.distill.student import Student

SEQUENCES, PROMPT, TOKENS = 16, 32, 48
SAMPLES, LONG_PROMPT, SHORT_TOKENS = 8, 512, 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an mlx-lm folder; default: the demo's student")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, limited_memory():
        path = arguments.model or make_student(
            convert_teacher(Path(folder) / "teacher", print), Path(folder) / "student", print
        )
        student = Student.load(path, None, LoraConfig(), seed=0, float32=True)
        student.eos_ids = ()
        _compare_batches(student, arguments.rounds)
        _compare_samples(student, arguments.rounds)


def _compare_batches(student: Student, rounds: int) -> None:
    prompts = _prompts(SEQUENCES, PROMPT)
    ways = {
        "mlx-lm, one at a time": lambda seed: _alone(student, prompts[seed % SEQUENCES], seed),
        "mlx-lm, 16 together": lambda seed: _together(student, prompts, seed),
        "opd, 16 together": lambda seed: _sampled(student, prompts, TOKENS, seed),
    }
    rates = {name: statistics.median(found) for name, found in _rates(ways, rounds).items()}
    for name, rate in rates.items():
        print(f"{name:<24}{rate:9.1f} tokens/s")
    alone, theirs, ours = rates.values()
    print(f"{'opd / one at a time':<24}{ours / alone:9.2f} x         aim 4 or more; {PROMPT} + {TOKENS} tokens")
    print(f"{'opd / mlx-lm together':<24}{ours / theirs:9.2f} x")


def _compare_samples(student: Student, rounds: int) -> None:
    one = _prompts(1, LONG_PROMPT) * SAMPLES
    unlike = _prompts(SAMPLES, LONG_PROMPT)
    ways = {
        "8 samples of a prompt": lambda seed: _sampled(student, one, SHORT_TOKENS, seed),
        "8 prompts": lambda seed: _sampled(student, unlike, SHORT_TOKENS, seed),
    }
    shared, apart = (statistics.median(found) for found in _rates(ways, rounds).values())
    print(f"{'read once / read 8 times':<24}{apart / shared:9.2f} x the time   {LONG_PROMPT} + {SHORT_TOKENS} tokens")


def _rates(ways: dict[str, Callable[[int], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every way in every round but the first."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            count = way(seed)
            rates[name].append(count / (time.perf_counter() - started))
    return {name: found[1:] for name, found in rates.items()}


def _prompts(count: int, length: int) -> list[Prompt]:
    ids = np.random.default_rng(length).integers(100, 40_000, (count, length)).tolist()
    return [Prompt(index, "", tuple(row)) for index, row in enumerate(ids)]


def _alone(student: Student, prompt: Prompt, seed: int) -> int:
    mx.random.seed(seed)
    steps = generate_step(mx.array(prompt.token_ids), student.model, max_tokens=TOKENS, sampler=mx.random.categorical)
    return sum(1 for _ in steps)


def _together(student: Student, prompts: list[Prompt], seed: int) -> int:
    generator = BatchGenerator(student.model, completion_batch_size=SEQUENCES, prefill_batch_size=SEQUENCES)
    samplers = [_sampler(seed, place) for place in range(len(prompts))]
    generator.insert([list(prompt.token_ids) for prompt in prompts], [TOKENS] * len(prompts), samplers=samplers)
    left, count = len(prompts), 0
    while left:
        responses: list[Any] = generator.next_generated()
        count += len(responses)
        left -= sum(response.finish_reason is not None for response in responses)
    generator.close()
    return count


def _sampler(seed: int, place: int) -> Callable[[mx.array], mx.array]:
    key = mx.random.key(1000 * seed + place)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs, key=now)

    return sample


def _sampled(student: Student, prompts: list[Prompt], tokens: int, seed: int) -> int:
    found = sample_completions(student, prompts, max_tokens=tokens, temperature=1.0, seed=seed)
    return sum(len(rollout.completion_ids) for rollout in found)


if __name__ == "__main__":
    main()
