"""What is wrong with a message is told of the field where it goes wrong."""

from __future__ import annotations

import time

import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct

from opd_daemon.v1 import run_pb2, teacher_pb2
from opd_daemon.wire.malformed import first_fault


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of at most 127 bytes or, in two bytes of length, more."""
    size = len(data)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return (
        bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0)])
        + (bytes([number >> 4]) if number > 15 else b"")
        + length
        + data
    )


def deep(levels: int) -> bytes:
    """A Struct in a Struct in a Struct …"""
    data = b""
    for _ in range(levels):
        data = field(1, field(1, b"k") + field(2, field(5, data)))
    return data


@pytest.mark.parametrize(
    ("message", "data", "name", "told"),
    [
        (run_pb2.GetRunRequest, b"\xff\xff", "GetRunRequest", "the number at byte 0 doesn't end"),
        (run_pb2.GetRunRequest, b"\x00\x01", "GetRunRequest", "there is no field 0"),
        (run_pb2.GetRunRequest, b"\x0f\x01", "GetRunRequest", "wire type 7"),
        (run_pb2.GetRunRequest, b"\x0a\x02\xff\xfe", "run_id", "byte 0 of 2 is not UTF-8"),
        (run_pb2.GetRunRequest, b"\x0a\x7fab", "run_id", "of 127 bytes 2 are there"),
        (run_pb2.ListRunsRequest, b"\x08" + b"\xff" * 11, "page_size", "doesn't end"),
        (run_pb2.CreateRunRequest, field(2, field(3, b"a\xff")), "config.trainer", "byte 1 of 2 is not UTF-8"),
        (run_pb2.CreateRunRequest, field(2, field(4, deep(100))), "config.trainer_options", "nested deeper than 100"),
        (
            teacher_pb2.ComputeLogprobsRequest,
            field(1, b"") + field(1, field(1, field(2, b"\xc3"))),
            "sequences.tokens.text",
            "not UTF-8",
        ),
    ],
)  # fmt: skip
def test_the_field_that_goes_wrong_is_named(message: type[Message], data: bytes, name: str, told: str) -> None:
    with pytest.raises(DecodeError):
        message.FromString(data)
    fault = first_fault(data, message.DESCRIPTOR)
    assert fault.field == name
    assert told in fault.description


def test_fields_of_a_newer_version_are_passed_over() -> None:
    data = b"\xf8\x7f\x05" + b"\xf9\x7f" + bytes(8) + b"\xfd\x7f" + bytes(4) + field(1, b"\xff")
    assert first_fault(data, run_pb2.GetRunRequest.DESCRIPTOR).field == "run_id"


def test_looking_for_the_fault_of_a_large_message_costs_little() -> None:
    data = 8_000_000 * b"\x0a\x00" + b"\xff"
    began = time.process_time()
    fault = first_fault(data, teacher_pb2.ComputeLogprobsRequest.DESCRIPTOR)
    assert time.process_time() - began < 0.5
    assert fault.field == "ComputeLogprobsRequest"


def test_what_is_deep_but_can_be_parsed_is_no_fault() -> None:
    assert Struct.FromString(deep(30))
