"""Plans of runs, with rates measured on this machine where there are some."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd_daemon.config import RunConfig
from opd_daemon.distill.machines import named_machine, this_machine
from opd_daemon.distill.planning import DiskSpace, RunFacts, plan
from opd_daemon.errors import OpdError, Reason
from opd_daemon.runs.calibration import Calibrations
from opd_daemon.trainer import TrainerInfo
from opd_daemon.types import CacheStats, Plan


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned. teacher_loaded: it is in memory already. machine: another one than this, by name.

    measure: this machine is idle, so what isn't known of it may be measured now, which takes some seconds.
    """

    config: RunConfig
    trainer: TrainerInfo
    teacher_loaded: bool = False
    machine: str = ""
    measure: bool = False


class Planner:
    """Plans runs; what it measures of this machine is kept. Calls block.

    folder: where runs and the teacher cache are kept. cache: what the cache holds and may hold.
    """

    def __init__(self, calibrations: Calibrations, folder: Path, cache: Callable[[], CacheStats]) -> None:
        self._calibrations = calibrations
        self._folder = folder
        self._cache = cache

    def plan(self, request: PlanRequest) -> Plan:
        """The plan of a run that has passed the preflight checks.

        Raises:
            OpdError: INVALID_REQUEST for an unknown machine; what the checks say if files have changed since.
        """
        if request.machine:
            machine = named_machine(request.machine)
            return plan(RunFacts.read(request.config, request.trainer, machine, loaded=False))
        facts = RunFacts.read(
            request.config, request.trainer, this_machine(), loaded=request.teacher_loaded, disk=self._disk()
        )
        return plan(facts, self._calibrations.rates(facts, measure=request.measure))

    def _disk(self) -> DiskSpace:
        cache = self._cache()
        return DiskSpace(shutil.disk_usage(self._folder).free, cache.bytes, cache.limit_bytes)


def does_not_fit(plan: Plan) -> OpdError:
    """The refusal of a run that would need more memory or disk than there is."""
    advice = "; ".join(plan.advice) or "use smaller or quantised models"
    message = f"{'; '.join(plan.warnings)}; change something (--force starts it all the same): {advice}"
    return OpdError(Reason.OUT_OF_MEMORY, message, needed_bytes=plan.peak_bytes, available_bytes=plan.available_bytes)
