"""Why the teacher takes no work."""

from __future__ import annotations

from opd_daemon.errors import OpdError, Reason


def not_loaded() -> OpdError:
    """The error for work without a teacher."""
    return OpdError(Reason.TEACHER_NOT_LOADED, "no teacher is loaded; load one with 'opd teacher load MODEL'")


def changed() -> OpdError:
    """The error for work whose teacher has gone."""
    return OpdError(Reason.TEACHER_CHANGED, "the teacher was unloaded or exchanged; call again")


def shutting_down() -> OpdError:
    """The error for work that comes too late."""
    return OpdError(Reason.SHUTTING_DOWN, "the daemon is shutting down")
