"""A web port on a real socket, with pages about a daemon made up for the test, and a client that sends raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

from opd_daemon.types import Run, RunState, TeacherInfo, TeacherState
from opd_daemon.web.pages import Shown
from opd_daemon.web.server import web_port

TOKEN = "the-token"
METRICS = b"opd_up 1\n"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


@dataclass
class Port:
    number: int

    async def raw(self, data: bytes) -> Answer:
        """Send bytes on a connection of their own; the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        try:
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = [line.partition(": ") for line in head[1:] if line]
            headers = {name.lower(): value for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            return Answer(int(head[0].split()[1]), headers, body.decode())
        finally:
            writer.close()

    async def ask(
        self, target: str, *lines: str, method: str = "GET", hosts: Sequence[str] | None = None, body: bytes = b""
    ) -> Answer:
        hosts = [f"127.0.0.1:{self.number}"] if hosts is None else hosts
        length = [f"Content-Length: {len(body)}"] if method == "POST" else []
        head = [f"{method} {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), *length, *lines, "", ""]
        return await self.raw("\r\n".join(head).encode() + body)

    async def code(self) -> str:
        answer = await self.ask("/login-code", bearer(), "Content-Type: application/json", method="POST", body=b"{}")
        return str(answer.body.split('"')[3])

    async def cookie(self) -> str:
        answer = await self.ask(f"/login?code={await self.code()}")
        return "Cookie: " + answer.headers["set-cookie"].partition(";")[0]


@dataclass
class Pretended:
    """What the pages are to show."""

    runs: list[Run] = field(default_factory=list)
    teacher: TeacherInfo | None = None

    def shown(self) -> Shown:
        async def listed(**_: Any) -> tuple[list[Run], str]:
            return self.runs, ""

        async def metrics() -> bytes:
            return METRICS

        state = TeacherState.READY if self.teacher else TeacherState.UNLOADED
        teacher = SimpleNamespace(info=self.teacher, state=state, failure=None, queued_tokens=0)
        return Shown(cast(Any, SimpleNamespace(list=listed)), cast(Any, teacher), metrics)


def bearer(token: str = TOKEN) -> str:
    return f"Authorization: Bearer {token}"


def run(run_id: str, **changes: Any) -> Run:
    return Run(run_id, RunState.RUNNING, {}, datetime.now(UTC), step=3, total_steps=10, **changes)


@asynccontextmanager
async def open_port(pretended: Pretended | None = None) -> AsyncIterator[Port]:
    async with web_port(0, TOKEN, (pretended or Pretended()).shown()) as number:
        yield Port(number)
