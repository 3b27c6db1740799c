"""How long `opd serve` takes until it serves, without a teacher, against an empty Python and against importing grpc.

    python bench/startup.py [--rounds 7]

CPU seconds (user and system, the least of several rounds) beside those on the clock: the former hardly depend on what
else the machine does. Each round has a fresh home. The first round, which may have to compile, is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

AIM_SECONDS = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and on the clock."""

    cpu: float
    clock: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    # Bytecode is kept as in a normal installation, whatever the environment says.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as bytecode:
        environment.setdefault("PYTHONPYCACHEPREFIX", bytecode)
        empty = least([script("pass", environment) for _ in range(rounds + 1)])
        grpc = least([script("import grpc", environment) for _ in range(rounds + 1)])
        serving = least([serve(environment) for _ in range(rounds + 1)])
    print(f"{'':24}  CPU s  clock s")
    for name, cost in (("python -c pass", empty), ("python -c 'import grpc'", grpc), ("opd serve, serving", serving)):
        print(f"{name:24}  {cost.cpu:5.2f}  {cost.clock:7.2f}")
    print(f"opd serve / import grpc: {serving.cpu / grpc.cpu:.1f} × CPU (aim: under {AIM_SECONDS:.0f} s on the clock)")


def least(costs: list[Cost]) -> Cost:
    """The least of each, the first left out."""
    return Cost(min(cost.cpu for cost in costs[1:]), min(cost.clock for cost in costs[1:]))


def script(code: str, environment: dict[str, str]) -> Cost:
    """A Python that runs `code` and ends."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(cpu, time.perf_counter() - started)


def serve(environment: dict[str, str]) -> Cost:
    """`opd serve` up to the line that says it serves."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "opd_daemon.cli", "serve", "--home", str(Path(folder) / "home")]
        started = time.perf_counter()
        with subprocess.Popen(
            [*command, "--until-stdin-closes"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as daemon:
            assert daemon.stdout
            assert daemon.stdin
            assert b" serves " in daemon.stdout.readline()
            clock = time.perf_counter() - started
            times = psutil.Process(daemon.pid).cpu_times()
            daemon.stdin.close()
        return Cost(times.user + times.system, clock)


if __name__ == "__main__":
    main()
