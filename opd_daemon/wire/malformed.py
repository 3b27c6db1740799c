"""What is wrong with bytes that are no message: the field at which they go wrong, and how.

protobuf only says that it can't parse. This follows it through the bytes, by the descriptor, until something is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from opd_daemon.errors import FieldViolation

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
SIZES = {VARINT: 0, FIXED64: 8, LENGTH: 0, FIXED32: 4}
LONGEST_VARINT = 10
# Where protobuf's own parsers stop.
MOST_LEVELS = 100
# Looking must not cost more than an answer is worth: a large message may have millions of fields.
MOST_FIELDS = 10_000
# What is inside of these is JSON to a caller: faults in there are told of the field that holds them.
WELL_KNOWN = "google.protobuf."


def first_fault(data: bytes, descriptor: Descriptor) -> FieldViolation:
    """The first thing wrong in `data`, by its field's path, or by the message's name where no field can be named."""
    try:
        _Reader().message(memoryview(data), descriptor, "", 0)
    except _Fault as fault:
        return FieldViolation(fault.path or descriptor.name, fault.description)
    return FieldViolation(descriptor.name, "can't be parsed; encode it with protobuf")


@dataclass
class _Fault(Exception):
    path: str
    description: str


class _Reader:
    """Goes through one message as a parser does."""

    def __init__(self) -> None:
        self._fields_left = MOST_FIELDS

    def message(self, data: memoryview, descriptor: Descriptor, path: str, level: int) -> None:
        """Raise the first fault of a message, if it is among its first fields."""
        if level > MOST_LEVELS:
            raise _Fault(path, f"nested deeper than {MOST_LEVELS} messages; send it flatter")
        place = 0
        while place < len(data) and self._fields_left:
            self._fields_left -= 1
            tag, place = _varint(data, place, path)
            if tag < 8 or tag & 7 not in SIZES:
                raise _Fault(path, f"there is no field {tag >> 3} of wire type {tag & 7}; encode it with protobuf")
            field = descriptor.fields_by_number.get(tag >> 3)
            inner = _inner(path, descriptor, field)
            value, place = _value(data, place, tag & 7, inner)
            if field is not None and tag & 7 == LENGTH:
                self._check(value, field, inner, level)

    def _check(self, value: memoryview, field: FieldDescriptor, path: str, level: int) -> None:
        if field.message_type is not None:
            self.message(value, field.message_type, path, level + 1)
        elif field.type == FieldDescriptor.TYPE_STRING:
            try:
                str(value, "utf-8")
            except UnicodeDecodeError as fault:
                text = f"byte {fault.start} of {len(value)} is not UTF-8; encode text as UTF-8"
                raise _Fault(path, text) from None


def _value(data: memoryview, place: int, wire_type: int, path: str) -> tuple[memoryview, int]:
    """The bytes of a field's value (none for a varint) and where the next field begins."""
    size = SIZES[wire_type]
    if wire_type == VARINT:
        _, place = _varint(data, place, path)
    elif wire_type == LENGTH:
        size, place = _varint(data, place, path)
    if size > len(data) - place:
        raise _Fault(path, f"cut off: of {size} bytes {len(data) - place} are there; send the whole message")
    return data[place : place + size], place + size


def _varint(data: memoryview, place: int, path: str) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(data[place : place + LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise _Fault(path, f"the number at byte {place} doesn't end; send the whole message")


def _inner(path: str, descriptor: Descriptor, field: FieldDescriptor | None) -> str:
    if field is None or descriptor.full_name.startswith(WELL_KNOWN) or descriptor.GetOptions().map_entry:
        return path
    return f"{path}.{field.name}" if path else field.name
