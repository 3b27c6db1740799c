"""What computing a shared prompt once saves: time to score 8 samples of one prompt, with and without, in one run.

    python bench/prompt_reuse.py [--model FOLDER] [--prompt 512] [--completion 64] [--samples 8] [--rounds 2]

Both ways go through the engine's own choice of batches and its scoring; only the model's permission to share differs.
The two are repeated in turn with new prompts; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np

from opd_daemon.arrays import Float32
from opd_daemon.demo.smollm2 import convert_teacher
from opd_daemon.teacher.batching import Budget, ScoreItem, next_batch
from opd_daemon.teacher.fair_queue import FairQueue
from opd_daemon.teacher.folder import open_folder
from opd_daemon.teacher.loading import LoadedModel, load
from opd_daemon.teacher.scoring import score_batch
from opd_daemon.types import ScoreRequest, Scores, ScoreWants
from opd_daemon.vocabulary import load_vocabulary

BUDGET, PIECE = Budget(2048, contended=2048, small=2048), 512  # the service takes 2048 tokens at a time
WANTS = ScoreWants(top_k=64)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an mlx-lm folder; default: the demo's teacher")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or convert_teacher(Path(folder) / "teacher", print)
        loaded = load(open_folder(str(path)), max(load_vocabulary(path)) + 1, lambda _: None)
        _compare(loaded, arguments)


def _compare(loaded: LoadedModel, arguments: argparse.Namespace) -> None:
    assert loaded.shares_prefixes, "this model's caches can't share a prompt"
    plain = replace(loaded, shares_prefixes=False)
    generator = np.random.default_rng(0)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, int] = {}
    for _ in range(arguments.rounds + 1):
        prompt = generator.integers(100, 40_000, arguments.prompt, dtype=np.int32)
        rests = generator.integers(100, 40_000, (arguments.samples, arguments.completion), dtype=np.int32)
        requests = [ScoreRequest(np.concatenate([prompt, rest]), len(prompt), WANTS) for rest in rests]
        found = {}
        for shares, model in ((False, plain), (True, loaded)):
            mx.reset_peak_memory()
            started, before = time.perf_counter(), mx.get_active_memory()
            found[shares] = _score(model, requests)
            seconds[shares].append(time.perf_counter() - started)
            peaks[shares] = mx.get_peak_memory() - before
        _check(found[False], found[True])
    without, once = (statistics.median(seconds[shares][1:]) for shares in (False, True))
    what = f"{arguments.samples} x ({arguments.prompt} + {arguments.completion}) tokens"
    print(f"prompt with each sample {without:8.2f} s    {what}, top {WANTS.top_k}")
    print(f"prompt once             {once:8.2f} s")
    print(f"ratio                   {once / without:8.3f}      aim 0.5 or less")
    print(f"memory over the weights {peaks[False] >> 20:8d} MiB  {peaks[True] >> 20} MiB with the prompt once")


def _score(loaded: LoadedModel, requests: list[ScoreRequest]) -> dict[int, Scores]:
    """As the engine does it: batch after batch until the queue is empty."""
    queue: FairQueue[ScoreItem] = FairQueue()
    indices: dict[ScoreItem, int] = {}
    for index, request in enumerate(requests):
        item = ScoreItem(request, "bench", lambda *_: None)
        indices[item] = index
        queue.add(item)
    results: dict[int, Scores] = {}
    while batch := next_batch(queue, BUDGET, shares=loaded.shares_prefixes):
        queue.take(batch)
        work = score_batch(loaded, [item.request for item in batch], PIECE)
        while True:
            try:
                next(work)
            except StopIteration as end:
                results.update({indices[item]: scores for item, scores in zip(batch, end.value, strict=True)})
                break
    return results


def _check(plain: dict[int, Scores], shared: dict[int, Scores]) -> None:
    for index, scores in plain.items():
        first, second = _logprobs(scores), _logprobs(shared[index])
        assert np.abs(first - second).max() < 1e-3, "both ways must say the same"


def _logprobs(scores: Scores) -> Float32:
    assert scores.token_logprobs is not None
    return scores.token_logprobs


if __name__ == "__main__":
    main()
