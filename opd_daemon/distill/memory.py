"""How much memory MLX may hold in this process, decided in one place."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import mlx.core as mx

from opd_daemon.distill.planning import CACHE_BYTES

# Each of these modules imported mlx-lm's function by name, so each name is replaced.
WIRING_MODULES = ("mlx_lm.utils", "mlx_lm.generate", "mlx_lm.tuner.trainer")


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes MLX holds now, and the most it has held since the last reading."""

    active_bytes: int
    peak_bytes: int


def limit_memory(limit_bytes: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
    """Bound MLX's buffer cache and keep mlx-lm from wiring three quarters of the machine's memory.

    Without a bound the cache of a training process grows until the machine swaps. Wiring is refused because the
    teacher's process needs the same memory. limit_bytes: MLX's own limit, 0 for its default; beyond it MLX waits for
    memory to come back, and fails when the machine has no more.
    """
    if limit_bytes:
        mx.set_memory_limit(limit_bytes)
    mx.set_cache_limit(cache_bytes)
    for name in WIRING_MODULES:
        module = importlib.import_module(name)
        module.maybe_set_recommended_wired_limit = _leave_wired_limit_alone  # type: ignore[attr-defined]


def read_memory() -> MemoryReading:
    """Read the counters and start a new peak."""
    reading = MemoryReading(mx.get_active_memory(), mx.get_peak_memory())
    mx.reset_peak_memory()
    return reading


def _leave_wired_limit_alone() -> None:
    return None
