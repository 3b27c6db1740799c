"""What is asked for a plan of a run, and what is said of one that doesn't fit; `planner` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from opd_daemon.config import RunConfig
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import TrainerInfo
from opd_daemon.types import Plan


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


def does_not_fit(plan: Plan) -> OpdError:
    """The refusal of a run that would need more memory or disk than there is."""
    advice = "; ".join(plan.advice) or "use smaller or quantised models"
    message = f"{'; '.join(plan.warnings)}; change something (--force starts it all the same): {advice}"
    return OpdError(Reason.OUT_OF_MEMORY, message, needed_bytes=plan.peak_bytes, available_bytes=plan.available_bytes)
