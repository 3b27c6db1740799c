"""How much memory MLX may hold in this process, decided in one place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import psutil

from opd_daemon.distill.footprint import worker_cache_bytes
from opd_daemon.distill.logits import on_host

# Each of these modules imported mlx-lm's function by name, so each name is replaced.
WIRING_MODULES = ("mlx_lm.utils", "mlx_lm.generate", "mlx_lm.tuner.trainer")
WIRING = "maybe_set_recommended_wired_limit"

# With less than this share of the memory free, systems begin to swap or to kill.
PRESSURE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes MLX holds now, and the most it has held since the last reading."""

    active_bytes: int
    peak_bytes: int


def limit_memory(limit_bytes: int = 0) -> None:
    """Bound MLX's buffer cache and keep mlx-lm from wiring three quarters of the machine's memory.

    Without a bound the cache of a training process grows until the machine swaps. Wiring is refused because the
    teacher's process needs the same memory. limit_bytes: MLX's own limit, 0 for its default; beyond it MLX waits for
    memory to come back, and fails when the machine has no more.
    """
    if limit_bytes:
        mx.set_memory_limit(limit_bytes)
    mx.set_cache_limit(worker_cache_bytes(on_host=on_host()))
    for name in WIRING_MODULES:
        setattr(importlib.import_module(name), WIRING, _leave_wired_limit_alone)


@contextmanager
def limited_memory(limit_bytes: int = 0) -> Iterator[None]:
    """`limit_memory` for the length of a run; limits and mlx-lm's functions are afterwards as they were before."""
    functions = {name: vars(importlib.import_module(name)).get(WIRING) for name in WIRING_MODULES}
    cache_limit = mx.set_cache_limit(worker_cache_bytes(on_host=on_host()))
    memory_limit = mx.set_memory_limit(limit_bytes) if limit_bytes else None
    try:
        limit_memory(limit_bytes)
        yield
    finally:
        mx.set_cache_limit(cache_limit)
        if memory_limit is not None:
            mx.set_memory_limit(memory_limit)
        for name, function in functions.items():
            setattr(importlib.import_module(name), WIRING, function)


def memory_pressure() -> str | None:
    """A warning when the machine's memory is nearly used up, with the cure; None while it isn't."""
    memory = psutil.virtual_memory()
    if memory.available >= PRESSURE_SHARE * memory.total:
        return None
    free, total = memory.available / (1 << 30), memory.total / (1 << 30)
    return f"{free:.1f} of {total:.1f} GiB of memory are free; close other programs, or lower batch_size"


def read_memory() -> MemoryReading:
    """Read the counters and start a new peak."""
    reading = MemoryReading(mx.get_active_memory(), mx.get_peak_memory())
    mx.reset_peak_memory()
    return reading


def _leave_wired_limit_alone() -> None:
    return None
