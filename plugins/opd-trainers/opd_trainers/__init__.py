"""The trainers `opd` comes with, packaged as anyone else's would be."""

from __future__ import annotations

from collections.abc import Iterable

from opd_daemon import hookimpl
from opd_daemon.trainer import Trainer, TrainerInfo
from opd_trainers import options

VERSION = "1.1.0"


@hookimpl
def opd_trainers() -> Iterable[TrainerInfo]:
    """The trainers of this package. Their modules are imported in the worker, when they are needed."""
    yield TrainerInfo(
        name="on_policy",
        version=VERSION,
        summary="the student samples, the teacher scores every token, the divergence is on the student's own tokens",
        factory=_on_policy,
        options=options.OnPolicyOptions,
        on_policy=True,
        faults=options.on_policy_faults,
    )
    yield TrainerInfo(
        name="offline",
        version=VERSION,
        summary="the teacher scores its own completions, or the data's, and the student learns its distributions",
        factory=_offline,
        sources=options.off_policy_sources,
    )
    yield TrainerInfo(
        name="dataset",
        version=VERSION,
        summary="the teacher scores the data's completions, and the student learns its distributions",
        factory=_dataset,
        sources=options.dataset_sources,
    )
    yield TrainerInfo(
        name="mixed",
        version=VERSION,
        summary="some steps on the student's own samples, the others on the teacher's completions or the data's",
        factory=_mixed,
        options=options.MixedOptions,
        on_policy=True,
        sources=options.mixed_sources,
    )
    yield TrainerInfo(
        name="sft",
        version=VERSION,
        summary="cross-entropy on the teacher's completions, or the data's; no distributions: the baseline",
        factory=_sft,
        uses_teacher=False,
        sources=options.off_policy_sources,
    )


def _on_policy() -> Trainer:
    from opd_trainers.on_policy import OnPolicy

    return OnPolicy()


def _offline() -> Trainer:
    from opd_trainers.offline import Offline

    return Offline()


def _dataset() -> Trainer:
    from opd_trainers.dataset import Dataset

    return Dataset()


def _mixed() -> Trainer:
    from opd_trainers.mixed import Mixed

    return Mixed()


def _sft() -> Trainer:
    from opd_trainers.sft import SupervisedFineTuning

    return SupervisedFineTuning()
