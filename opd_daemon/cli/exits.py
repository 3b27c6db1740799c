"""What the exit codes mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_daemon.errors import Code, OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.types import RunState

OK = 0
FAILED = 1
USAGE = 2
NO_DAEMON = 3
STOPPED = 4
INTERRUPTED = 130

HELP = (
    "Exit codes: 0 done; 1 the run or the command failed; 2 wrong usage or input; 3 no daemon; "
    "4 the run was stopped or interrupted and can be resumed; 130 Ctrl-C."
)

_INPUT = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.OUT_OF_RANGE, Code.ALREADY_EXISTS})


def of_error(error: OpdError) -> int:
    """The exit code an error ends the command with."""
    if error.reason is Reason.DAEMON_NOT_RUNNING:
        return NO_DAEMON
    named_wrongly = error.code in _INPUT or error.reason is Reason.PATH_NOT_ALLOWED
    return USAGE if named_wrongly else FAILED


def of_state(state: RunState) -> int:
    """The exit code of a command that followed a run until it came to rest in this state."""
    return {"SUCCEEDED": OK, "FAILED": FAILED}.get(state, STOPPED)
