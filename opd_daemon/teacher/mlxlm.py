"""mlx-lm, imported without its side effects on the process.

Importing it lowers the limit of open files to 2048 (and the hard limit to 4096, for good), and everything in it that
generates wires three quarters of the machine's memory. A daemon that shares the machine with workers wants neither.
"""

from __future__ import annotations

import importlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from opd_daemon.imports import importing

WIRING_MODULES = ("mlx_lm.utils", "mlx_lm.generate")


@cache
def module(name: str) -> ModuleType:
    """The module `mlx_lm.<name>`."""
    with importing, _file_limit_kept():
        found = importlib.import_module(f"mlx_lm.{name}")
        for wiring in WIRING_MODULES:
            patched = importlib.import_module(wiring)
            if hasattr(patched, "maybe_set_recommended_wired_limit"):
                patched.maybe_set_recommended_wired_limit = _wire_nothing  # type: ignore[attr-defined]
    return found


def _wire_nothing() -> None:
    """Stands in for mlx-lm's own; the engine sets the limit for the whole process."""


@contextmanager
def _file_limit_kept() -> Iterator[None]:
    original = resource.setrlimit
    # The hard limit can't be raised again afterwards, so the call itself has to do nothing.
    resource.setrlimit = _keep_limit
    try:
        yield
    finally:
        resource.setrlimit = original


def _keep_limit(_resource: int, _limits: Any) -> None:
    """Stands in for `resource.setrlimit` while mlx-lm is imported."""
