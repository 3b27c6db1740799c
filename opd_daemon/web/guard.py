"""What every request to the web port passes: other sites' pages, forged hosts and forms end here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 64 << 10
BODY_SECONDS = 10.0
HTTP_PORT = 80
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Lets through what is addressed to this port by name, comes from its own pages or from no page, and is small.

    A page of another site whose name was made to point here (DNS rebinding) shows itself by its Host; a form or script
    of another site by its Origin, or by a type of content that only scripts with leave may send.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        names = ("localhost", "127.0.0.1", "[::1]")
        bare = names if port == HTTP_PORT else ()  # there, browsers leave the port out
        self._hosts = frozenset(name.encode() for name in (*bare, *(f"{name}:{port}" for name in names)))
        self._origins = frozenset(b"http://" + host for host in self._hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None and scope["method"] == "POST":
            try:
                receive = await _whole_body(receive)
            except _Refused as refused:
                refusal = refused.response
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return _plain(421, "this port answers to localhost and 127.0.0.1 only")
        if origins and (len(origins) > 1 or origins[0].lower() not in self._origins):
            return _plain(403, "requests from other sites' pages are refused")
        if scope["method"] == "POST" and _media_types(scope) != [b"application/json"]:
            return _plain(415, "send application/json")
        return None


class _Refused(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


async def _whole_body(receive: Receive) -> Receive:
    """A receiver of the request's body, read already: neither large nor slow ones reach the pages."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > LARGEST_BODY:
                    raise _Refused(_plain(413, f"the body is larger than {LARGEST_BODY} bytes"))
    except TimeoutError:
        raise _Refused(_plain(408, f"the body took longer than {BODY_SECONDS:.0f} s")) from None

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _plain(status: int, text: str) -> Response:
    # What is left of a refused body is not worth reading.
    return PlainTextResponse(f"{text}\n", status, headers={"Connection": "close"})


def _values(scope: Scope, name: bytes) -> list[bytes]:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]


def _media_types(scope: Scope) -> list[bytes]:
    return [value.partition(b";")[0].strip().lower() for value in _values(scope, b"content-type")]
