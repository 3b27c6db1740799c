"""Errors on the wire carry what programs need."""

from __future__ import annotations

from google.rpc import error_details_pb2

from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.wire.errors import to_status


def test_a_full_queue_says_when_to_try_again() -> None:
    status = to_status(OpdError(Reason.QUEUE_FULL, "full", retry_after_milliseconds=1_500))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details if detail.Is(retry.DESCRIPTOR))
    assert retry.retry_delay.ToMilliseconds() == 1_500


def test_every_error_has_one_error_info_and_faults_of_fields_beside_it() -> None:
    violation = FieldViolation("config.batch_size", "0: must be at least 1")
    status = to_status(OpdError(Reason.INVALID_RUN_CONFIG, "faulty", violations=[violation]))
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
    assert kinds == ["ErrorInfo", "BadRequest"]
