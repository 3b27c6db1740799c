"""Errors on the wire: `OpdError` ↔ `google.rpc.Status` with ErrorInfo and BadRequest."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from opd_daemon.errors import DOMAIN, FieldViolation, OpdError, Reason

# gRPC refuses headers above 16 KiB, and the details travel in one: long lists of faults are cut, with a word.
MAX_VIOLATIONS = 50
MAX_DESCRIPTION = 200
MAX_MESSAGE = 1000

_REASON_OF_BARE_CODE = {
    grpc.StatusCode.UNAVAILABLE: Reason.DAEMON_NOT_RUNNING,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.MALFORMED_MESSAGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.QUEUE_FULL,
    grpc.StatusCode.UNAUTHENTICATED: Reason.WRONG_TOKEN,
}


def to_status(error: OpdError) -> status_pb2.Status:
    """The status of an error: code, one-line message, ErrorInfo always, BadRequest when there are field violations."""
    details = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_short(error.metadata)))
    ]
    if error.violations:
        details.append(_packed(_bad_request(error.violations)))
    code = code_pb2.Code.Value(error.code)
    return status_pb2.Status(code=code, message=_clipped(error.message, MAX_MESSAGE), details=details)


def from_rpc_error(error: grpc.RpcError) -> OpdError:
    """The `OpdError` the daemon raised, or the nearest one when the answer did not come from `opd`."""
    status = _status_of(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not _unpacked(status, info) or info.reason not in Reason.__members__:
        return _from_bare_code(error)
    bad_request = error_details_pb2.BadRequest()
    _unpacked(status, bad_request)
    violations = [FieldViolation(entry.field, entry.description) for entry in bad_request.field_violations]
    metadata = {key: value for key, value in info.metadata.items() if key not in ("reason", "message", "violations")}
    return OpdError(Reason(info.reason), status.message, violations=violations, **metadata)


def _from_bare_code(error: grpc.RpcError) -> OpdError:
    if not isinstance(error, grpc.Call):
        return OpdError(Reason.INTERNAL, str(error))
    code = error.code()
    return OpdError(
        _REASON_OF_BARE_CODE.get(code, Reason.INTERNAL), f"{code.name}: {error.details()}", grpc_code=code.name
    )


def _status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    if not isinstance(error, grpc.Call):
        return None
    try:
        return rpc_status.from_call(error)
    except ValueError:  # code or message beside the details differ from those in them
        return None


def _bad_request(violations: tuple[FieldViolation, ...]) -> error_details_pb2.BadRequest:
    entries = [
        error_details_pb2.BadRequest.FieldViolation(
            field=_clipped(violation.field, MAX_DESCRIPTION),
            description=_clipped(violation.description, MAX_DESCRIPTION),
        )
        for violation in violations[:MAX_VIOLATIONS]
    ]
    if len(violations) > MAX_VIOLATIONS:
        more = f"{len(violations) - MAX_VIOLATIONS} more faults are not shown"
        entries.append(error_details_pb2.BadRequest.FieldViolation(field="…", description=more))
    return error_details_pb2.BadRequest(field_violations=entries)


def _short(metadata: dict[str, str]) -> dict[str, str]:
    return {key: _clipped(value, MAX_DESCRIPTION) for key, value in metadata.items()}


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _unpacked(status: status_pb2.Status, into: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> bool:
    return any(detail.Unpack(into) for detail in status.details if detail.Is(into.DESCRIPTOR))
