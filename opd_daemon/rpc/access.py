"""Who is calling: one token for people and programs of this user, one per worker for its own run."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from opd_daemon.errors import OpdError, Reason

OPEN_PREFIX = "/grpc.health.v1.Health/"
_PACKAGE = "/opd_daemon.v1."
WORKER_METHODS = frozenset(
    _PACKAGE + method
    for method in (
        "WorkerService/GetAssignment",
        "WorkerService/ReportEvents",
        "WorkerService/ReportComparison",
        "WorkerService/AcquireLease",
        "TeacherService/GetTeacher",
        "TeacherService/UnloadTeacher",
        "TeacherService/ComputeLogprobs",
        "TeacherService/Generate",
        "TeacherService/GetHead",
        "TeacherService/Tokenize",
        "TeacherService/GetCacheStats",
        "RunService/GetRun",
        "RunService/WatchEvents",
    )
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever holds the token of a call; `run_id` is set for a worker and names the only run it may touch."""

    run_id: str = ""

    def require_run(self, run_id: str) -> None:
        """Refuse a worker that reaches for another run than its own."""
        if self.run_id and self.run_id != run_id:
            raise OpdError(Reason.OUT_OF_SCOPE, f"this token is for run {self.run_id!r} only", run_id=self.run_id)


# Who calls without the token what is open to all.
STRANGER = Caller()
caller: ContextVar[Caller] = ContextVar("caller")


class Gate:
    """Turns the authorization header of a call into a `Caller`, or refuses the call."""

    def __init__(self, token: str, run_of_worker_token: Callable[[str], str | None]) -> None:
        self._token = token.encode()
        self._run_of_worker_token = run_of_worker_token

    def admit(self, method: str, authorization: str | None) -> Caller:
        """The caller.

        Raises:
            OpdError: MISSING_TOKEN, WRONG_TOKEN, or OUT_OF_SCOPE for a worker calling what only clients may.
        """
        if method.startswith(OPEN_PREFIX) and not self._is_owner(authorization):
            return STRANGER
        if not authorization:
            raise OpdError(Reason.MISSING_TOKEN, "no token: send the header 'authorization: Bearer <token>'")
        if self._is_owner(authorization):
            return Caller()
        scheme, _, token = authorization.partition(" ")
        run_id = self._run_of_worker_token(token) if scheme.lower() == "bearer" else None
        if run_id is None:
            raise OpdError(Reason.WRONG_TOKEN, "the token is not this daemon's; read it again from its discovery file")
        if method not in WORKER_METHODS:
            raise OpdError(Reason.OUT_OF_SCOPE, "a worker's token does not open this call", run_id=run_id)
        return Caller(run_id)

    def _is_owner(self, authorization: str | None) -> bool:
        scheme, _, token = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), self._token)
