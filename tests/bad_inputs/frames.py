"""A client of HTTP/2 that says what it likes: frames by hand, no state machine, no good manners."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence

DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACKNOWLEDGED = 1, 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STATUS = re.compile(rb"grpc-status.([0-9]{1,2})", re.DOTALL)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """One frame; `length` lies about its size."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: str, value: str | bytes) -> bytes:
    """One header as a literal that is never indexed, without Huffman coding."""
    value = value.encode() if isinstance(value, str) else value
    return b"\x10" + _number(len(name)) + name.encode() + _number(len(value)) + value


def request_headers(path: str | bytes, token: str, extra: Sequence[tuple[str, str | bytes]] = ()) -> bytes:
    """The headers of one gRPC call."""
    pairs: list[tuple[str, str | bytes]] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("authorization", f"Bearer {token}"),
        *extra,
    ]
    return b"".join(header(name, value) for name, value in pairs)


def message(data: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """A gRPC message; `length` lies about its size."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def call(path: str | bytes, token: str, body: bytes, extra: Sequence[tuple[str, str | bytes]] = ()) -> bytes:
    """A whole connection with one call in it."""
    head = frame(HEADERS, END_HEADERS, 1, request_headers(path, token, extra))
    pieces = [body[start : start + 16384] for start in range(0, len(body), 16384)]
    last = frame(DATA, END_STREAM, 1, pieces.pop() if pieces else b"")
    return PREFACE + frame(SETTINGS, 0, 0) + head + b"".join(frame(DATA, 0, 1, piece) for piece in pieces) + last


@contextlib.contextmanager
def connected(port: int, seconds: float = 5.0) -> Iterator[socket.socket]:
    """A connection to loopback on which nothing takes longer."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        yield connection


def answer(port: int, data: bytes, seconds: float = 5.0, pause: tuple[int, float] = (0, 0.0)) -> bytes:
    """All that comes back until the other side closes, a call ends, or nothing comes any more.

    pause: after how many bytes the client stops, and for how many seconds.
    """
    received = b""
    with connected(port, seconds) as connection, contextlib.suppress(OSError):
        connection.sendall(data[: pause[0]])
        time.sleep(pause[1])
        connection.sendall(data[pause[0] :])
        while piece := connection.recv(65536):
            received += piece
            if STATUS.search(received):
                break
    return received


def status(received: bytes) -> int | None:
    """The gRPC status in an answer; None when there is none."""
    found = STATUS.search(received)
    return int(found[1]) if found else None


def _number(value: int) -> bytes:
    if value < 127:
        return bytes([value])
    encoded, value = b"\x7f", value - 127
    while value >= 128:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    return encoded + bytes([value])
