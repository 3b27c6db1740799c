"""Errors on the wire: `OpdError` ↔ `google.rpc.Status` with ErrorInfo, BadRequest and RetryInfo."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from opd_daemon.errors import DOMAIN, RETRY_AFTER, FieldViolation, OpdError, Reason

# In bytes. The details travel in a header, and gRPC drops answers whose headers exceed 8 KiB (some of them) or 16 KiB
# (all): long lists of faults are cut, with a word. The message travels twice, once with up to three bytes for each.
MAX_STATUS = 4400
MAX_MESSAGE = 700
MAX_FIELD = 200
MAX_DESCRIPTION = 1000

_REASON_OF_BARE_CODE = {
    grpc.StatusCode.UNAVAILABLE: Reason.DAEMON_NOT_RUNNING,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.MALFORMED_MESSAGE,
    # From gRPC itself, whose limits are on sizes; the daemon's own come with a reason.
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.INVALID_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: Reason.WRONG_TOKEN,
}


def to_status(error: OpdError) -> status_pb2.Status:
    """The status of an error: code, one-line message, ErrorInfo always, BadRequest and RetryInfo with cause."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_short(error.metadata))
    code = code_pb2.Code.Value(error.code)
    status = status_pb2.Status(code=code, message=_clipped(error.message, MAX_MESSAGE), details=[_packed(info)])
    if RETRY_AFTER in error.metadata:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.metadata[RETRY_AFTER]))
        status.details.append(_packed(retry))
    if error.violations:
        status.details.append(_packed(_bad_request(error.violations, MAX_STATUS - status.ByteSize())))
    return status


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


def _bad_request(violations: tuple[FieldViolation, ...], room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit into `room` bytes, and how many more there are."""
    request = error_details_pb2.BadRequest()
    for number, violation in enumerate(violations):
        field, description = _clipped(violation.field, MAX_FIELD), _clipped(violation.description, MAX_DESCRIPTION)
        request.field_violations.add(field=field, description=description)
        if request.ByteSize() > room:
            del request.field_violations[-1]
            more = f"{len(violations) - number} more faults are not shown"
            request.field_violations.add(field="…", description=more)
            break
    return request


def _short(metadata: dict[str, str]) -> dict[str, str]:
    return {key: _clipped(value, MAX_FIELD) for key, value in metadata.items()}


def _clipped(text: str, limit: int) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def _packed(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _unpacked(status: status_pb2.Status, into: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> bool:
    return any(detail.Unpack(into) for detail in status.details if detail.Is(into.DESCRIPTOR))
