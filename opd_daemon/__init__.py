"""On-policy distillation for MLX. This module has the names that authors of plugins import; it loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_daemon.errors import OpdError
from opd_daemon.hookspecs import hookimpl

if TYPE_CHECKING:
    from opd_daemon.trainer import DivergenceInfo, RunRefused, TrainerInfo

    __version__: str

__all__ = ["DivergenceInfo", "OpdError", "RunRefused", "TrainerInfo", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    # pydantic and numpy take a quarter of a second, and `opd --help` needs neither.
    if name in ("DivergenceInfo", "RunRefused", "TrainerInfo"):
        from opd_daemon import trainer

        return getattr(trainer, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("opd-daemon")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
