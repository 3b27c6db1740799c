"""Requests of every call of the contract, sound ones and broken ones; the same seed gives the same requests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from opd_daemon.v1 import catalog_pb2, run_pb2, teacher_pb2, worker_pb2

FILES = (teacher_pb2, run_pb2, catalog_pb2, worker_pb2)
DEEPEST = 6
# What is larger than the limit never gets to the daemon's own code.
LARGEST = 1 << 20

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
REALS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
WILD_REALS = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, -0.0, 0.0, 1.0, -1.0, 2.0**53)
WILD_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "a\nb\r\n",
    "\x1b[31mred",
    "../../etc/passwd",
    "/dev/zero",
    "~root",
    "%s%n{0}",
    "\u202egnirts",
    "😀" * 30,
    "e\u0301",
    "A" * 10_000,
    "'; DROP TABLE runs;--",
    "nan",
    "-1",
    "9" * 30,
    "con",
    "\ufeffbom",
    "\U0010ffff",
)

Known = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Method:
    """One call of the contract."""

    path: str
    request: Descriptor
    streams_in: bool
    streams_out: bool


def methods() -> list[Method]:
    """Every call of every service, new ones too."""
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    return [_method(method) for service in services for method in service.methods]


def _method(method: MethodDescriptor) -> Method:
    path = f"/{method.containing_service.full_name}/{method.name}"
    return Method(path, method.input_type, method.client_streaming, method.server_streaming)


class Mutator:
    """Makes requests. `known` holds sound values by a field's name: so some requests get beyond the first check."""

    def __init__(self, seed: int, known: Known) -> None:
        self._random = random.Random(seed)
        self._known = known

    def request(self, method: Method) -> bytes:
        """One request: a tenth sound, half with a few wild fields, the rest with broken bytes."""
        message = self._sound(method.request, 0)
        kind = self._random.random()
        if kind < 0.1:
            return message.SerializeToString()
        if kind < 0.6:
            for _ in range(self._random.randint(1, 3)):
                self._make_wild(message)
            return message.SerializeToString()
        return self._broken(message.SerializeToString())

    # Sound messages

    def _sound(self, descriptor: Descriptor, level: int) -> Message:
        message: Message = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if level < DEEPEST and self._random.random() < 0.75:
                self._set(message, field, lambda field: self._sound_value(field, level))
        return message

    def _sound_value(self, field: FieldDescriptor, level: int) -> Any:
        if field.name in self._known:
            return self._random.choice(self._known[field.name])
        if field.message_type is not None:
            return self._sound(field.message_type, level + 1)
        return self._random.choice(_sound_values(field))

    def _set(self, message: Message, field: FieldDescriptor, value: Any) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._set_entry(message, field, value)
        elif field.is_repeated:
            self._fill(getattr(message, field.name), field, value)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(value(field))
        else:
            setattr(message, field.name, value(field))

    def _fill(self, entries: Any, field: FieldDescriptor, value: Any) -> None:
        del entries[:]
        entries.extend(value(field) for _ in range(self._random.choice((0, 1, 1, 2, 3))))

    def _set_entry(self, message: Message, field: FieldDescriptor, value: Any) -> None:
        key, held = field.message_type.fields
        entries = getattr(message, field.name)
        if held.message_type is not None:
            entries[value(key)].CopyFrom(value(held))
        else:
            entries[value(key)] = value(held)

    # Wild fields

    def _make_wild(self, message: Message) -> None:
        """Give one field somewhere in a message a value nobody would send."""
        field = self._random.choice(message.DESCRIPTOR.fields or [None])
        while field is not None and field.message_type is not None and not field.is_repeated:
            message = getattr(message, field.name)
            message.SetInParent()
            field = self._random.choice(message.DESCRIPTOR.fields or [None])
        if field is None:
            return
        self._set(message, field, self._wild_value)
        if field.is_repeated and not isinstance(getattr(message, field.name), Mapping) and self._random.random() < 0.2:
            entries = getattr(message, field.name)
            entries.extend([entry for entry in entries for _ in range(self._random.choice((100, 3000)))])

    def _wild_value(self, field: FieldDescriptor) -> Any:
        if field.message_type is not None:
            message = self._sound(field.message_type, 1)
            self._make_wild(message)
            return message
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._random.randbytes(self._random.choice((0, 1, 3, 4, 7, 8, 400, 5000)))
        return self._random.choice(_wild_values(field))

    # Broken bytes

    def _broken(self, data: bytes) -> bytes:
        for _ in range(self._random.choice((1, 1, 2, 4, 16))):
            data = self._random.choice((_flip, _cut, _insert, _repeat, _overwrite))(data, self._random)[:LARGEST]
        return data


def _sound_values(field: FieldDescriptor) -> Sequence[Any]:
    if field.cpp_type in INTEGERS:
        return (0, 1, 2, 3, 7, 16)
    if field.cpp_type in REALS:
        return (0.0, 0.5, 1.0, 2.0)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return (False, True)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return [value.number for value in field.enum_type.values]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return (b"", bytes(8), b"\x01\0\0\0\x02\0\0\0\x03\0\0\0")
    return ("a", "on_policy", "Tell me about tides.", "user")


def _wild_values(field: FieldDescriptor) -> Sequence[Any]:
    if field.cpp_type in INTEGERS:
        low, high = INTEGERS[field.cpp_type]
        return (low, low + 1, max(low, -1), 0, high // 2, high - 1, high)
    if field.cpp_type in REALS:
        return WILD_REALS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return (False, True)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return (-1, 99, 2**31 - 1, -(2**31))
    return WILD_TEXTS


def _place(data: bytes, source: random.Random) -> int:
    return source.randrange(len(data) + 1)


def _flip(data: bytes, source: random.Random) -> bytes:
    if not data:
        return b"\xff"
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << source.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, source: random.Random) -> bytes:
    return data[: _place(data, source)]


def _insert(data: bytes, source: random.Random) -> bytes:
    place = _place(data, source)
    return data[:place] + source.randbytes(source.randint(1, 12)) + data[place:]


def _repeat(data: bytes, source: random.Random) -> bytes:
    begin, end = sorted((_place(data, source), _place(data, source)))
    return data[:end] + data[begin:end] * source.randint(1, 40) + data[end:]


def _overwrite(data: bytes, source: random.Random) -> bytes:
    place = _place(data, source)
    return data[:place] + source.choice((b"\xff" * 9, b"\x00", b"\x7f", b"\x80\x80\x80\x80\x10")) + data[place + 1 :]
