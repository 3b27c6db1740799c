"""What a flood costs others: a small client's waiting under ten times the load the teacher can bear, in one run.

    python bench/overload.py [--seconds 30]

A small client sends one call after the other: alone, and while another process offers ten times the tokens that the
teacher can score, whether it is refused or not. Then the same with completions, beside hundreds of prompts that are
continued, by a model large enough that reading its weights is what decoding waits for. The 95th percentiles of the
small client's calls are compared, and the daemon's memory is watched.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError
from opd_daemon.home import Home
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants
from tests.tiny import write_tiny_qwen2

OVERLOAD = 10
SMALL, LARGE = (2, 256), (16, 256)  # sequences and their tokens in one call
PROMPTS, NEW_TOKENS, SMALL_TOKENS = 16, 64, 16
SENDERS = 64
SAMPLE_SECONDS = 0.1
# Once the flood has filled the queue.
SETTLING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds of calls that were made one after the other."""

    seconds: list[float]

    @property
    def p50(self) -> float:
        """The median, in milliseconds."""
        return 1000 * float(np.quantile(self.seconds, 0.5))

    @property
    def p95(self) -> float:
        """What 95 of 100 calls stay below, in milliseconds."""
        return 1000 * float(np.quantile(self.seconds, 0.95))


def main() -> None:
    """Measure and print; with --flood, be the other process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--flood", choices=("score", "generate"), help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        flood(Client.find(Home(arguments.home)), arguments.flood, arguments.rate)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = write_tiny_qwen2(folder / "small", seed=1, hidden=256, layers=6, heads=8, context=1024)
        large = write_tiny_qwen2(folder / "large", seed=1, hidden=1024, layers=8, heads=16, context=1024)
        with LocalDaemon(Home(folder / "home")) as daemon, daemon.client() as client:
            print(f"{'small client':34} {'alone p50':>10} {'p95':>8} {'flooded p50':>12} {'p95':>8} {'ratio':>6}   ms")
            load(client, small)
            score_flooded(client, folder / "home", arguments.seconds)
            load(client, large)
            generate_flooded(client, folder / "home", arguments.seconds)


def load(client: Client, model: Path) -> None:
    """Make a model the teacher."""
    for _ in client.load_teacher(str(model)):
        pass


def score_flooded(client: Client, home: Path, seconds: float) -> None:
    """Scores, alone and under a flood of scores."""
    timed(lambda: small_score(client), 2.0)
    rate = capacity(client)
    alone = timed(lambda: small_score(client), seconds)
    memory = Memory()
    with flooded(home, "score", OVERLOAD * rate):
        time.sleep(SETTLING_SECONDS)
        memory.start()
        found = timed(lambda: small_score(client), seconds)
        growth, peak = memory.stop()
    show("scores 2 x 256 tokens", alone, found)
    print(f"the teacher scores {rate:.0f} tokens/s; the flood offered {OVERLOAD * rate:.0f}")
    change = f"{growth / 1e6:+.0f} MB from the first to the last third"
    print(f"the daemon's memory under the flood of scores: {change}, at most {peak / 1e6:.0f} MB")


def generate_flooded(client: Client, home: Path, seconds: float) -> None:
    """Completions, alone and under a flood of completions."""
    timed(lambda: small_generate(client), 2.0)
    alone = timed(lambda: small_generate(client), seconds)
    with flooded(home, "generate", 0.0):
        time.sleep(SETTLING_SECONDS)
        # The first calls meet the sequences that the flood had begun before anybody else was there.
        first = timed(lambda: small_generate(client), SETTLING_SECONDS)
        found = timed(lambda: small_generate(client), 2 * seconds)
    show(f"continues a prompt by {SMALL_TOKENS}", alone, found)
    print(f"the first completion beside the flood takes {1000 * first.seconds[0]:.0f} ms")


def show(name: str, before: Latencies, after: Latencies) -> None:
    """One line of the table."""
    numbers = f"{before.p50:10.0f} {before.p95:8.0f} {after.p50:12.0f} {after.p95:8.0f}"
    print(f"{name:34} {numbers} {after.p95 / before.p95:6.2f}   {len(after.seconds)} calls")


def requests(count: int, tokens: int) -> list[ScoreRequest]:
    """Sequences nobody has scored before."""
    drawn = np.random.default_rng().integers(5, 300, (count, tokens), dtype=np.int32)
    return [ScoreRequest(row, 1, ScoreWants(token_stats=True)) for row in drawn]


def small_score(client: Client) -> None:
    """One call of the small client."""
    client.score(requests(*SMALL), use_cache=False)


def small_generate(client: Client) -> None:
    """One completion for the small client."""
    prompt = tuple(np.random.default_rng().integers(5, 300, 32).tolist())
    client.generate([GenerateRequest(prompt, max_tokens=SMALL_TOKENS)], use_cache=False)


def timed(call: Callable[[], None], seconds: float) -> Latencies:
    """Call again and again."""
    found = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return Latencies(found)


def capacity(client: Client) -> float:
    """Tokens the teacher scores in a second, with enough to do."""
    started = time.perf_counter()
    client.score(requests(4 * LARGE[0], LARGE[1]), use_cache=False)
    return 4 * LARGE[0] * LARGE[1] / (time.perf_counter() - started)


class flooded:  # noqa: N801 - used like a function
    """While inside, another process floods the daemon, and has filled what it may."""

    def __init__(self, home: Path, kind: str, rate: float) -> None:
        self._command = [sys.executable, __file__, "--flood", kind, "--rate", str(rate), "--home", str(home)]

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        sys.stdout.write(self._process.communicate(timeout=60)[0])


def flood(client: Client, kind: str, rate: float) -> None:
    """Offer work until standard input closes, and say what became of it."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    outcomes: Counter[str] = Counter()

    @cache
    def say_full() -> None:
        print("full", flush=True)

    def send() -> None:
        try:
            if kind == "score":
                client.score(requests(*LARGE), use_cache=False)
            else:
                prompts = [GenerateRequest(tuple(range(5, 37)), max_tokens=NEW_TOKENS, seed=n) for n in range(PROMPTS)]
                client.generate(prompts, use_cache=False)
            outcomes["answered"] += 1
        except OpdError as error:
            outcomes[error.reason.value] += 1
            say_full()

    # Scores are not waited for, so that what is offered doesn't depend on how fast the answers come.
    pause = LARGE[0] * LARGE[1] / rate if rate else 0.0
    waiting: list[threading.Thread] = []
    while not ended.wait(pause):
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        waiting = [thread for thread in [*waiting, sender] if thread.is_alive()]
        if kind == "generate" and len(waiting) == SENDERS:
            say_full()
            while all(thread.is_alive() for thread in waiting) and not ended.wait(SAMPLE_SECONDS):
                pass
    print(f"flood of {kind}: {dict(outcomes)}", flush=True)


class Memory:
    """Resident bytes of the daemon, looked at in the background."""

    def start(self) -> None:
        """Begin to look."""
        (daemon,) = [child for child in psutil.Process().children() if "opd_daemon.cli" in child.cmdline()]
        self._process = daemon
        self._found: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, int]:
        """Bytes by which the mean of the last third exceeds that of the first, and the most there were."""
        self._ended.set()
        self._thread.join()
        third = len(self._found) // 3
        return float(np.mean(self._found[-third:]) - np.mean(self._found[:third])), max(self._found)

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._found.append(self._process.memory_info().rss)


if __name__ == "__main__":
    main()
