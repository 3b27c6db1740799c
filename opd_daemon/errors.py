"""Every error `opd` reports, and the one map from its reason to a gRPC status code.

An error has a *reason* (stable, for programs), a *message* (one line, for people: the offending value, where it came
from, the cure) and *metadata* (every changing part of the message again, for programs). Input faults also carry one
`FieldViolation` per fault. The daemon raises `OpdError`; the Python client raises the same class again on its side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

DOMAIN = "opd"
# Metadata of an error that passes by itself: milliseconds after which trying again is worth it.
RETRY_AFTER = "retry_after_milliseconds"

# How MLX (on Metal and on CPU), the C++ runtime, OpenBLAS and Python say that there is no memory.
OUT_OF_MEMORY_SIGNS = re.compile(
    r"malloc|unable to allocate|out of memory|insufficient memory|bad_alloc|MemoryError|memory allocation .*failed",
    re.IGNORECASE,
)


class Code(StrEnum):
    """The gRPC status codes the daemon answers with, by their canonical names."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class Reason(StrEnum):
    """Why a call failed. Names are part of the contract (`google.rpc.ErrorInfo.reason`) and never change meaning."""

    INVALID_REQUEST = "INVALID_REQUEST"
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    INVALID_RUN_CONFIG = "INVALID_RUN_CONFIG"
    INVALID_PAGE_TOKEN = "INVALID_PAGE_TOKEN"  # noqa: S105 - a reason, not a secret
    RUN_NOT_FOUND = "RUN_NOT_FOUND"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    REPORT_NOT_FOUND = "REPORT_NOT_FOUND"
    TRAINER_NOT_FOUND = "TRAINER_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    RUN_STATE_CONFLICT = "RUN_STATE_CONFLICT"
    RUN_REFUSED = "RUN_REFUSED"
    TEACHER_NOT_LOADED = "TEACHER_NOT_LOADED"
    TEACHER_IN_USE = "TEACHER_IN_USE"
    TEACHER_CHANGED = "TEACHER_CHANGED"
    TEACHER_LOAD_FAILED = "TEACHER_LOAD_FAILED"
    TOKENIZER_MISMATCH = "TOKENIZER_MISMATCH"
    HIDDEN_NOT_SUPPORTED = "HIDDEN_NOT_SUPPORTED"
    STORE_CHANGED = "STORE_CHANGED"
    STORE_UNUSABLE = "STORE_UNUSABLE"
    REVISION_COMPACTED = "REVISION_COMPACTED"
    REVISION_IN_FUTURE = "REVISION_IN_FUTURE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_WATCHERS = "TOO_MANY_WATCHERS"
    DISK_FULL = "DISK_FULL"
    TEACHER_LOADING = "TEACHER_LOADING"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    DAEMON_NOT_RUNNING = "DAEMON_NOT_RUNNING"
    DAEMON_ALREADY_RUNNING = "DAEMON_ALREADY_RUNNING"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    MISSING_TOKEN = "MISSING_TOKEN"  # noqa: S105 - a reason, not a secret
    WRONG_TOKEN = "WRONG_TOKEN"  # noqa: S105 - a reason, not a secret
    OUT_OF_SCOPE = "OUT_OF_SCOPE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    NOT_A_NUMBER = "NOT_A_NUMBER"
    MODELS_UNSOUND = "MODELS_UNSOUND"
    TRAINER_FAILED = "TRAINER_FAILED"
    WORKER_DIED = "WORKER_DIED"
    DAEMON_DIED = "DAEMON_DIED"
    INTERNAL = "INTERNAL"


CODES: dict[Reason, Code] = {
    Reason.INVALID_REQUEST: Code.INVALID_ARGUMENT,
    Reason.MALFORMED_MESSAGE: Code.INVALID_ARGUMENT,
    Reason.INVALID_RUN_CONFIG: Code.INVALID_ARGUMENT,
    Reason.INVALID_PAGE_TOKEN: Code.INVALID_ARGUMENT,
    Reason.RUN_NOT_FOUND: Code.NOT_FOUND,
    Reason.CHECKPOINT_NOT_FOUND: Code.NOT_FOUND,
    Reason.REPORT_NOT_FOUND: Code.NOT_FOUND,
    Reason.TRAINER_NOT_FOUND: Code.NOT_FOUND,
    Reason.MODEL_NOT_FOUND: Code.NOT_FOUND,
    Reason.PATH_NOT_ALLOWED: Code.PERMISSION_DENIED,
    Reason.REQUEST_ID_REUSED: Code.ALREADY_EXISTS,
    Reason.RUN_STATE_CONFLICT: Code.FAILED_PRECONDITION,
    Reason.RUN_REFUSED: Code.FAILED_PRECONDITION,
    Reason.TEACHER_NOT_LOADED: Code.FAILED_PRECONDITION,
    Reason.TEACHER_IN_USE: Code.FAILED_PRECONDITION,
    Reason.TEACHER_CHANGED: Code.FAILED_PRECONDITION,
    Reason.TEACHER_LOAD_FAILED: Code.FAILED_PRECONDITION,
    Reason.TOKENIZER_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.HIDDEN_NOT_SUPPORTED: Code.FAILED_PRECONDITION,
    Reason.STORE_CHANGED: Code.FAILED_PRECONDITION,
    Reason.STORE_UNUSABLE: Code.FAILED_PRECONDITION,
    Reason.REVISION_COMPACTED: Code.OUT_OF_RANGE,
    Reason.REVISION_IN_FUTURE: Code.OUT_OF_RANGE,
    Reason.OUT_OF_MEMORY: Code.RESOURCE_EXHAUSTED,
    Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_WATCHERS: Code.RESOURCE_EXHAUSTED,
    Reason.DISK_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.TEACHER_LOADING: Code.UNAVAILABLE,
    Reason.SHUTTING_DOWN: Code.UNAVAILABLE,
    Reason.DAEMON_NOT_RUNNING: Code.UNAVAILABLE,
    Reason.DAEMON_ALREADY_RUNNING: Code.FAILED_PRECONDITION,
    Reason.NOT_IMPLEMENTED: Code.UNIMPLEMENTED,
    Reason.MISSING_TOKEN: Code.UNAUTHENTICATED,
    Reason.WRONG_TOKEN: Code.UNAUTHENTICATED,
    Reason.OUT_OF_SCOPE: Code.PERMISSION_DENIED,
    Reason.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    Reason.CANCELLED: Code.CANCELLED,
    Reason.NOT_A_NUMBER: Code.DATA_LOSS,
    Reason.MODELS_UNSOUND: Code.FAILED_PRECONDITION,
    Reason.TRAINER_FAILED: Code.INTERNAL,
    Reason.WORKER_DIED: Code.INTERNAL,
    Reason.DAEMON_DIED: Code.INTERNAL,
    Reason.INTERNAL: Code.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One fault: `field` is its path in the request (`config.batch_size`), `description` the value and the cure."""

    field: str
    description: str


class OpdError(Exception):
    """A failure with a stable reason. `str(error)` is the one-line message a person should see."""

    def __init__(
        self, reason: Reason, message: str, *, violations: Iterable[FieldViolation] = (), **metadata: object
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @property
    def code(self) -> Code:
        """The gRPC status code of this error's reason."""
        return CODES[self.reason]

    def __str__(self) -> str:
        if not self.violations:
            return self.message
        faults = "\n".join(f"  {violation.field}: {violation.description}" for violation in self.violations)
        return f"{self.message}\n{faults}"


def invalid(field: str, description: str, reason: Reason = Reason.INVALID_REQUEST) -> OpdError:
    """An input error with a single fault."""
    return violations_error([FieldViolation(field, description)], reason)


def violations_error(violations: Iterable[FieldViolation], reason: Reason = Reason.INVALID_REQUEST) -> OpdError:
    """An input error with one entry per fault."""
    faults = tuple(violations)
    count = "1 field is" if len(faults) == 1 else f"{len(faults)} fields are"
    return OpdError(reason, f"{count} not valid", violations=faults, fields=", ".join(fault.field for fault in faults))
