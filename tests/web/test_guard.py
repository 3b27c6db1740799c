"""Whom the web port answers: rows 74 to 76 of the list of faults, and the headers of every answer."""

from __future__ import annotations

import pytest

from tests.asynchronous import asynchronous
from tests.web.port import bearer, open_port

OURS = ("localhost", "127.0.0.1", "[::1]", "LOCALHOST")
# Other names, other ways to write this address, and names that end or begin as ours do.
FOREIGN = (
    "evil.com",
    "evil.com:{port}",
    "2130706433:{port}",
    "0x7f000001:{port}",
    "0177.0.0.1:{port}",
    "127.1:{port}",
    "0.0.0.0:{port}",
    "localhost.evil.com:{port}",
    "evil-localhost:{port}",
    "foo.localhost:{port}",
    "box.local:{port}",
    "localhost.:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "user@127.0.0.1:{port}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.1:{port} ,evil.com",
    "",
)


@asynchronous
async def test_the_port_answers_to_its_own_names() -> None:
    async with open_port() as port:
        for name in OURS:
            assert (await port.ask("/healthz", hosts=[f"{name}:{port.number}"])).status == 200, name


@asynchronous
async def test_a_host_that_is_not_ours_is_refused_even_with_the_token() -> None:
    async with open_port() as port:
        for host in FOREIGN:
            answer = await port.ask("/metrics", bearer(), hosts=[host.format(port=port.number)])
            assert answer.status in {400, 421}, host
            assert "opd_up" not in answer.body


@asynchronous
async def test_no_host_and_two_hosts_are_refused() -> None:
    async with open_port() as port:
        ours = f"127.0.0.1:{port.number}"
        assert (await port.ask("/metrics", bearer(), hosts=[])).status == 400
        assert (await port.ask("/metrics", bearer(), hosts=[ours, "evil.com"])).status in {400, 421}
        assert (await port.ask("/metrics", bearer(), hosts=[ours, ours])).status in {400, 421}
        assert (await port.raw(f"GET /metrics HTTP/1.0\r\n{bearer()}\r\n\r\n".encode())).status == 421


@asynchronous
async def test_the_host_of_an_absolute_target_opens_nothing() -> None:
    async with open_port() as port:
        target = f"http://127.0.0.1:{port.number}/metrics"
        assert (await port.ask(target, bearer(), hosts=["evil.com"])).status == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://127.0.0.1:1", ""]
)
def test_a_foreign_origin_is_refused_even_with_a_session(origin: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            cookie = await port.cookie()
            answer = await port.ask("/metrics", cookie, f"Origin: {origin.format(port=port.number)}")
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers

    scenario()


@asynchronous
async def test_our_own_origin_and_none_are_served() -> None:
    async with open_port() as port:
        cookie = await port.cookie()
        assert (await port.ask("/metrics", cookie)).status == 200
        assert (await port.ask("/metrics", cookie, f"Origin: http://localhost:{port.number}")).status == 200


@pytest.mark.parametrize(
    "content",
    [
        "Content-Type: text/plain",
        "Content-Type: application/x-www-form-urlencoded",
        "Content-Type: multipart/form-data",
        "Content-Type: text/plain; application/json",
        "Content-Type: application/jsonp",
        "X-None: 1",
    ],
)
def test_a_post_a_form_could_send_is_refused(content: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            answer = await port.ask("/login-code", bearer(), content, method="POST", body=b"{}")
            assert answer.status == 415

    scenario()


@asynchronous
async def test_a_preflight_is_granted_nothing() -> None:
    async with open_port() as port:
        lines = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
        answer = await port.ask("/login-code", *lines, f"Origin: http://localhost:{port.number}", method="OPTIONS")
        assert answer.status == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


@asynchronous
async def test_every_answer_forbids_scripts_frames_sniffing_and_keeping() -> None:
    async with open_port() as port:
        asked = [
            await port.ask("/"),
            await port.ask("/", await port.cookie()),
            await port.ask("/healthz"),
            await port.ask("/metrics"),
            await port.ask("/nowhere"),
            await port.ask("/healthz", hosts=["evil.com"]),
            await port.ask("/login-code", method="POST"),
            await port.ask(f"/login?code={await port.code()}"),
        ]
    assert {answer.status for answer in asked} == {200, 303, 401, 404, 415, 421}
    for answer in asked:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
