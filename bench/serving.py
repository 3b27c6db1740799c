"""What the daemon costs: tokens/s of ComputeLogprobs against a bare batched forward of the same tokens, in one run.

    python bench/serving.py [--model FOLDER] [--rounds 5]

Eight clients send 128-token sequences at once and ask for the top 64; the bare forward is `model(tokens)` of mlx-lm on
the same eight sequences in one batch, in this process while the daemon is idle. Both are repeated in turn; medians are
compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import mlx_lm
import numpy as np

from opd_daemon.arrays import Int32
from opd_daemon.client import Client
from opd_daemon.demo.smollm2 import convert_teacher
from opd_daemon.home import Home
from opd_daemon.types import ScoreRequest, ScoreWants
from opd_daemon.wire.arrays import score_blocks

CLIENTS, LENGTH, TOP_K = 8, 128, 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an mlx-lm folder; default: the demo's teacher")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or convert_teacher(Path(folder) / "teacher", print)
        home = Home(Path(folder) / "home")
        daemon = _start_daemon(home)
        try:
            _compare(model, home, arguments.rounds)
        finally:
            assert daemon.stdin is not None
            daemon.stdin.close()
            daemon.wait(60)


def _start_daemon(home: Home) -> subprocess.Popen[bytes]:
    home.root.mkdir(parents=True)
    command = [sys.executable, "-m", "opd_daemon.cli", "serve", "--until-stdin-closes"]
    daemon = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "OPD_HOME": str(home.root)}
    )
    while not home.discovery.exists():
        time.sleep(0.05)
    return daemon


def _compare(path: Path, home: Home, rounds: int) -> None:
    model, _ = mlx_lm.load(str(path))
    sequences = np.random.default_rng(0).integers(100, 40_000, (rounds + 1, CLIENTS, LENGTH), dtype=np.int32)
    clients = [Client.find(home) for _ in range(CLIENTS)]
    for _ in clients[0].load_teacher(str(path)):
        pass
    bare, served = [], []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for batch in sequences:
            bare.append(_bare_seconds(model, batch))
            served.append(_served_seconds(pool, clients, batch))
    tokens = CLIENTS * LENGTH
    bare_rate, served_rate = (tokens / statistics.median(seconds[1:]) for seconds in (bare, served))
    print(f"bare batched forward   {bare_rate:8.1f} tokens/s")
    print(f"ComputeLogprobs        {served_rate:8.1f} tokens/s   top {TOP_K}, {CLIENTS} clients x {LENGTH} tokens")
    print(f"ratio                  {served_rate / bare_rate:8.3f}           aim 0.85 or more")
    position_bytes = _bytes_per_position(clients[0], sequences[1][0])
    print(f"bytes per position     {position_bytes:8.1f}           top {TOP_K} ids, logprobs and tail, as sent")
    overhead = _overhead(clients[0], sequences[1][0])
    print(f"RPC overhead           {overhead:8.2f} ms        one cached sequence, there and back")


def _bare_seconds(model: mlx_lm.models.base.nn.Module, batch: Int32) -> float:
    started = time.perf_counter()
    mx.eval(model(mx.array(batch)))
    return time.perf_counter() - started


def _served_seconds(pool: ThreadPoolExecutor, clients: list[Client], batch: Int32) -> float:
    started = time.perf_counter()
    list(pool.map(lambda pair: pair[0].score([_request(pair[1])]), zip(clients, batch, strict=True)))
    return time.perf_counter() - started


def _request(sequence: Int32) -> ScoreRequest:
    return ScoreRequest(sequence, 1, ScoreWants(token_stats=False, top_k=TOP_K))


def _bytes_per_position(client: Client, sequence: Int32) -> float:
    """Size of the answer's messages, as they go over the wire, per scored position."""
    request = _request(sequence)
    (result,) = client.score([request])
    return sum(block.ByteSize() for block in score_blocks(0, request, result)) / request.rows


def _overhead(client: Client, sequence: Int32) -> float:
    """Median milliseconds of a call that is answered from the cache."""
    times = []
    for _ in range(50):
        started = time.perf_counter()
        (result,) = client.score([_request(sequence)])
        times.append(1000 * (time.perf_counter() - started))
        assert result.cached
    return statistics.median(times)


if __name__ == "__main__":
    main()
