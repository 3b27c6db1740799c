"""Every hook of `opd`, readable in a minute.

A plugin is a package with an entry point in the group `opd_daemon` whose module has functions decorated with
`opd_daemon.hookimpl`. A hook implementation may take fewer arguments than its specification.
Hooks run in the daemon; a trainer's `train` runs in a worker process. Import heavy modules inside functions: the
daemon imports every plugin at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from opd_daemon.trainer import DivergenceInfo, TrainerInfo
    from opd_daemon.types import Event, Run

PROJECT = "opd_daemon"
ENTRY_POINT_GROUP = "opd_daemon"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def opd_trainers() -> Iterable[TrainerInfo]:
    """Return the trainers this plugin offers. A name that is already taken is refused and reported."""
    raise NotImplementedError


@hookspec
def opd_divergences() -> Iterable[DivergenceInfo]:
    """Return the divergences this plugin offers. A name that is already taken is refused and reported."""
    raise NotImplementedError


@hookspec
def opd_before_run_started(run: Run) -> None:
    """Look at a validated run before it is accepted; raise `opd_daemon.RunRefused("why")` to refuse it."""


@hookspec
def opd_event(event: Event) -> None:
    """Receive one durable event, in order, off the hot path. Three failures in a row disable the hook."""


@hookspec
def opd_after_run_finished(run: Run) -> None:
    """A run has come to rest: SUCCEEDED, STOPPED, FAILED or INTERRUPTED (see `run.state`)."""


@hookspec
def opd_daemon_stopping() -> None:
    """The daemon is about to exit: flush and close what this plugin holds open."""
