"""Limits of one run, gone with it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest

from opd_daemon.distill.memory import WIRING, WIRING_MODULES, limited_memory, memory_pressure, read_memory


def wiring() -> list[object]:
    return [getattr(importlib.import_module(name), WIRING) for name in WIRING_MODULES]


def limits() -> tuple[int, int]:
    """MLX tells a limit only when it is set."""
    cache, memory = mx.set_cache_limit(1 << 20), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(cache)
    mx.set_memory_limit(memory)
    return cache, memory


@pytest.fixture
def other_limits() -> Iterator[None]:
    """Limits that no run sets."""
    cache, memory = mx.set_cache_limit(1 << 27), mx.set_memory_limit(1 << 39)
    yield
    mx.set_cache_limit(cache)
    mx.set_memory_limit(memory)


@pytest.mark.usefixtures("other_limits")
def test_a_run_leaves_limits_and_mlx_lm_as_they_were() -> None:
    before, functions = limits(), wiring()
    with pytest.raises(ValueError, match="stop"), limited_memory(1 << 33):  # noqa: PT012
        assert limits()[1] == 1 << 33
        assert limits()[0] != before[0]
        assert all(now is not then for now, then in zip(wiring(), functions, strict=True))
        raise ValueError("stop")
    assert limits() == before
    assert wiring() == functions


def test_reading_starts_a_new_peak() -> None:
    array = mx.zeros((1 << 20,))
    mx.eval(array)
    assert read_memory().peak_bytes >= array.nbytes
    held = mx.get_active_memory()
    del array
    read_memory()
    assert read_memory().peak_bytes < held


@pytest.mark.parametrize(("share", "warns"), [(0.5, False), (0.01, True)])
def test_pressure_is_told_when_little_is_free(monkeypatch: pytest.MonkeyPatch, share: float, warns: bool) -> None:
    total = 64 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=int(share * total)))
    assert (memory_pressure() is not None) == warns
