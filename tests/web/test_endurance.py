"""Slow, large and senseless clients of the web port: row 15, and the HTTP side of rows 8 and 16."""

from __future__ import annotations

import asyncio
import gzip
import os
import random

import psutil
import pytest

from opd_daemon.web import guard, server
from tests.asynchronous import asynchronous
from tests.web.port import Port, bearer, open_port

# `make soak` makes it 10 000.
GARBAGE = int(os.environ.get("OPD_GARBAGE_CONNECTIONS", "500"))
PATIENCE = 0.3
JSON = "Content-Type: application/json"


async def end_of(port: Port, *pieces: bytes) -> bytes:
    """Send pieces slowly; what came back until the port closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port.number)
    said = asyncio.create_task(reader.read(-1))
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(PATIENCE / 4)
            if said.done():
                break
        return await asyncio.wait_for(said, 20 * PATIENCE)
    except ConnectionError:
        return b""
    finally:
        writer.close()


SLOW = {
    "says nothing": [],
    "never ends its headers": [b"GET /healthz HTTP/1.1\r\n", *[b"X-%d: 1\r\n" % n for n in range(40)]],
    "sends its first line byte by byte": [bytes([byte]) for byte in b"GET /healthz HTTP/1.1 and so on and so on"],
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW.keys())
def test_a_client_is_left_that(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", PATIENCE)

    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            assert b"ok" not in await end_of(port, *pieces)
            assert (await port.ask("/healthz")).status == 200

    scenario()


def test_a_second_request_may_not_be_slower_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", PATIENCE)

    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            first = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port.number}\r\n\r\n".encode()
            said = await end_of(port, first, *[b"GET /healthz HTTP/1.1\r\n", *[b"X: 1\r\n"] * 40])
            assert said.count(b"200 OK") == 1

    scenario()


def test_a_body_that_never_comes_ends_in_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", PATIENCE)

    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            head = f"POST /login-code HTTP/1.1\r\nHost: 127.0.0.1:{port.number}\r\n{bearer()}\r\n{JSON}\r\n"
            assert b" 408 " in await end_of(port, head.encode() + b"Content-Length: 2\r\n\r\n", b"{")

    scenario()


@asynchronous
async def test_what_is_too_large_is_refused() -> None:
    async with open_port() as port:
        lines = b"".join(b"X-%d: %b\r\n" % (number, b"x" * 1000) for number in range(1000))
        host = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port.number}\r\n".encode()
        assert b"200 OK" not in await end_of(port, host + lines + b"\r\n")
        large = b"x" * (guard.LARGEST_BODY + 1)
        assert (await port.ask("/login-code", bearer(), JSON, method="POST", body=large)).status == 413
        packed = gzip.compress(b"x" * (8 << 20))  # never unpacked
        bomb = await port.ask("/login-code", bearer(), JSON, "Content-Encoding: gzip", method="POST", body=packed)
        assert bomb.status == 200


def test_connections_beyond_the_limit_are_closed_and_those_before_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 8)

    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            idle = [await asyncio.open_connection("127.0.0.1", port.number) for _ in range(8)]
            assert await end_of(port) == b""
            reader, writer = idle[0]
            writer.write(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port.number}\r\n\r\n".encode())
            assert b"200" in await reader.readline()
            for _, writer in idle:
                writer.close()
            await asyncio.sleep(0.05)
            assert (await port.ask("/healthz")).status == 200

    scenario()


@asynchronous
async def test_thousands_of_senseless_connections_leave_no_trace() -> None:
    chance = random.Random(15)
    kinds = (
        lambda: chance.randbytes(chance.randrange(1, 400)),
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(40),
        lambda: b"GET / HTTP/9.9\r\n\r\n",
        lambda: b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzzz",
        lambda: b"",
    )
    async with open_port() as port:
        before, started = psutil.Process().num_fds(), psutil.Process().memory_info().rss
        for number in range(GARBAGE):
            _, writer = await asyncio.open_connection("127.0.0.1", port.number)
            writer.write(kinds[number % len(kinds)]())
            writer.close()
            if number % 50 == 0:
                assert (await port.ask("/healthz")).status == 200
        await asyncio.sleep(0.2)
        assert (await port.ask("/healthz")).status == 200
        assert psutil.Process().num_fds() <= before + 8
        assert psutil.Process().memory_info().rss - started < 32 << 20
