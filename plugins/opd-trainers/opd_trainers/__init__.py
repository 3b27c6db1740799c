"""The trainers `opd` comes with, packaged as anyone else's would be."""

from __future__ import annotations

from collections.abc import Iterable

from opd_daemon import hookimpl
from opd_daemon.trainer import Trainer, TrainerInfo

VERSION = "1.0.0"


@hookimpl
def opd_trainers() -> Iterable[TrainerInfo]:
    """The trainers of this package. Their modules are imported in the worker, when they are needed."""
    yield TrainerInfo(
        name="on_policy",
        version=VERSION,
        summary="the student samples, the teacher scores every token, the divergence is on the student's own tokens",
        factory=_on_policy,
    )
    yield TrainerInfo(
        name="offline",
        version=VERSION,
        summary="the teacher scores its own completions, or the data's, and the student learns its distributions",
        factory=_offline,
    )


def _on_policy() -> Trainer:
    from opd_trainers.on_policy import OnPolicy

    return OnPolicy()


def _offline() -> Trainer:
    from opd_trainers.offline import Offline

    return Offline()
