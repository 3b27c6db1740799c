"""Plans of runs, with rates measured on this machine where there are some."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from opd_daemon.distill.machines import named_machine, this_machine
from opd_daemon.distill.planning import DiskSpace, RunFacts, plan
from opd_daemon.runs.calibration import Calibrations
from opd_daemon.runs.plans import PlanRequest
from opd_daemon.types import CacheStats, Plan


class Planner:
    """Plans runs; what it measures of this machine is kept. Calls block.

    folder: where runs and the teacher cache are kept. cache: what the cache holds and may hold. beside: other runs that
    may train at the same time.
    """

    def __init__(
        self, calibrations: Calibrations, folder: Path, cache: Callable[[], CacheStats], *, beside: int = 0
    ) -> None:
        self._calibrations = calibrations
        self._folder = folder
        self._cache = cache
        self._beside = beside

    def plan(self, request: PlanRequest) -> Plan:
        """The plan of a run that has passed the preflight checks.

        Raises:
            OpdError: INVALID_REQUEST for an unknown machine; what the checks say if files have changed since.
        """
        if request.machine:
            machine = named_machine(request.machine)
            return plan(RunFacts.read(request.config, request.trainer, machine, loaded=False))
        machine = this_machine(beside=self._beside)
        facts = RunFacts.read(
            request.config, request.trainer, machine, loaded=request.teacher_loaded, disk=self._disk()
        )
        return plan(facts, self._calibrations.rates(facts, measure=request.measure))

    def _disk(self) -> DiskSpace:
        cache = self._cache()
        return DiskSpace(shutil.disk_usage(self._folder).free, cache.bytes, cache.limit_bytes)
