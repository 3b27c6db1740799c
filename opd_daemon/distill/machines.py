"""Machines a run can be planned for by name, and what they are known to do.

Sources, as collected in November 2026: mlx-lm BENCHMARKS.md (M4 Max 64 GB: Qwen3-4B, 13.0 TFLOP/s in prefill),
mlx-serve#120 (M4 Max and M5 Max, Qwen3.6-27B at 4 bits: prefill 240-269 and 608-670 tokens/s), MTPLX#265 and splash#37
(M3 Max, 27B at 4 bits: 193-320), mlx-examples#1029 (M3 Max, 70B at 4 bits: prefill 83, decoding 9.3), mlx-lm#468 and
#478 (gain of batched decoding), mlx-train-perf (M1 Max, QLoRA on 8B: 92-98 tokens/s), unsloth#1289 (M4 Max, LoRA on
8B: about 430 tokens/s over 16 layers). Decoding is linear in the batch: a pass over the weights at `bandwidth`, and
every sequence's own products at `decode_flops`. Training rates of the M5 are the least certain.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import psutil

from opd_daemon.errors import OpdError, invalid

GIB = 1 << 30
# Metal lets all processes together keep about this share of the memory resident (recommendedMaxWorkingSetSize).
METAL_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Machine:
    """Sustained rates: products in FLOP/s when scoring, training and decoding in batches; weights read in bytes/s.

    total_bytes: of memory; usable_bytes: of these, for daemon and worker. disk: bytes/s a model is read with. float32:
    the only type it multiplies fast.
    """

    name: str
    score_flops: float
    train_flops: float
    decode_flops: float
    bandwidth: float
    total_bytes: int
    usable_bytes: int
    disk: float = 3e9
    float32: bool = False


# name: (scoring, training, batched decoding in TFLOP/s, weights read in GB/s, memory sizes in GB)
CHIPS: dict[str, tuple[float, float, float, float, tuple[int, ...]]] = {
    "M1 Max": (4.3, 3.9, 2.8, 300, (32, 64)),
    "M3 Max": (11.1, 8.5, 6.0, 380, (36, 48, 64, 96, 128)),
    "M4 Pro": (6.7, 5.5, 4.2, 215, (24, 48, 64)),
    "M4 Max": (13.4, 11.0, 8.4, 430, (36, 48, 64, 128)),
    "M5 Max": (33.7, 24.5, 10.6, 590, (36, 48, 64, 128)),
}

# Stands for chips that aren't in the table.
SLOWEST_PRO = "M4 Pro"


def named_machine(name: str) -> Machine:
    """The machine of that name, as in "M4 Max 64 GB".

    Raises:
        OpdError: INVALID_REQUEST listing those there are.
    """
    words = re.fullmatch(r"\s*(?:apple\s+)?(\w+(?:\s+\w+)?)\s+(\d+)\s*(?:GB|G|GiB)?\s*", name, re.IGNORECASE)
    chip = next((known for known in CHIPS if words and known.lower() == " ".join(words[1].lower().split())), "")
    if words is None or not chip or int(words[2]) not in CHIPS[chip][4]:
        raise _unknown(name)
    score, train, decode, bandwidth, _ = CHIPS[chip]
    total = int(words[2]) * GIB
    rates = (score * 1e12, train * 1e12, decode * 1e12, bandwidth * 1e9)
    return Machine(f"{chip} {words[2]} GB", *rates, total, int(total * METAL_SHARE))


def machine_names() -> list[str]:
    """Every name `named_machine` knows."""
    return [f"{chip} {size} GB" for chip, (*_, sizes) in CHIPS.items() for size in sizes]


def this_machine(*, beside: int = 0) -> Machine:
    """Typical rates of machines like this one, and the memory that a run of this process's daemon may use.

    beside: other runs that train at the same time.
    """
    total, usable = psutil.virtual_memory().total, free_memory(beside)
    if sys.platform == "darwin":
        chip = next((known for known in CHIPS if known in _processor()), SLOWEST_PRO)
        score, train, decode, bandwidth, _ = CHIPS[chip]
        rates = (score * 1e12, train * 1e12, decode * 1e12, bandwidth * 1e9)
        return Machine(f"this machine ({_processor()})", *rates, total, min(usable, int(total * METAL_SHARE)))
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    rates = (4e10 * cores, 2.5e10 * cores, 2e10 * cores, 1e10)
    return Machine(f"this machine ({cores} CPU cores)", *rates, total, usable, disk=1e9, float32=True)


def free_memory(beside: int = 0) -> int:
    """Bytes that this process and one it starts may use in all: what is free, and what this one's processes hold.

    beside: as many of the processes it started, the largest, keep what they hold.
    """
    own = psutil.Process()
    children = sorted((_held(child, *_descendants(child)) for child in own.children()), reverse=True)
    return psutil.virtual_memory().available + _held(own) + sum(children[beside:])


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:  # ended meanwhile
        return []


def _held(*processes: psutil.Process) -> int:
    held = 0
    for process in processes:
        try:
            held += process.memory_info().rss
        except psutil.Error:  # ended meanwhile
            continue
    return held


@cache
def _processor() -> str:
    """The chip's name, as in Apple M4 Max."""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()


def _unknown(name: str) -> OpdError:
    names = machine_names()
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return invalid("machine", f"{name!r} is not known; {hint}there are {', '.join(names)}")
