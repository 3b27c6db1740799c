"""What the web port shows, and to whom."""

from __future__ import annotations

import re

import pytest

from opd_daemon.types import TeacherInfo
from opd_daemon.web.sessions import CODE_SECONDS, MOST_CODES, SESSION_SECONDS, Sessions
from tests.asynchronous import asynchronous
from tests.web.port import METRICS, TOKEN, Pretended, bearer, open_port, run

HOSTILE = "<script>alert(1)</script>\"'&"


def teacher(name: str) -> TeacherInfo:
    digests, sizes = ("d" * 64, "t" * 64), (8, 8, 8, 8, 8)
    return TeacherInfo(name, "/secret/models/t", *digests, "qwen2", *sizes, "float32", 0, True, "", (1,))


@asynchronous
async def test_health_is_open_and_says_nothing_but_ok() -> None:
    async with open_port() as port:
        answer = await port.ask("/healthz")
        assert (answer.status, answer.body) == (200, "ok\n")


@asynchronous
async def test_figures_and_page_are_shown_to_the_token_only() -> None:
    async with open_port() as port:
        for target in ("/metrics", "/"):
            assert (await port.ask(target, bearer())).status == 200
            for line in ("X-None: 1", bearer(""), bearer("wrong"), f"Authorization: Basic {TOKEN}", "Cookie: x=y"):
                answer = await port.ask(target, line)
                assert answer.status == 401, line
                assert "opd_up" not in answer.body
        assert (await port.ask("/metrics", bearer())).body.encode() == METRICS


@pytest.mark.parametrize("name", ["token", "access_token", "code", "authorization"])
def test_a_token_in_the_query_opens_nothing(name: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with open_port() as port:
            assert (await port.ask(f"/metrics?{name}={TOKEN}")).status == 401
            assert (await port.ask(f"/login?code={TOKEN}")).status == 401

    scenario()


@asynchronous
async def test_a_code_becomes_a_cookie_that_scripts_and_other_sites_cannot_use() -> None:
    async with open_port() as port:
        answer = await port.ask(f"/login?code={await port.code()}")
        assert (answer.status, answer.headers["location"]) == (303, "/")
        flags = answer.headers["set-cookie"].lower()
        assert "httponly" in flags
        assert "samesite=strict" in flags
        assert "domain" not in flags
        assert TOKEN not in answer.headers["set-cookie"]
        page = await port.ask("/", "Cookie: " + answer.headers["set-cookie"].partition(";")[0])
        assert page.status == 200


@asynchronous
async def test_a_code_works_once() -> None:
    async with open_port() as port:
        code = await port.code()
        assert (await port.ask(f"/login?code={code}")).status == 303
        again = await port.ask(f"/login?code={code}")
        assert again.status == 401
        assert "set-cookie" not in again.headers


@asynchronous
async def test_only_the_token_itself_makes_codes() -> None:
    async with open_port() as port:
        json = "Content-Type: application/json"
        assert (await port.ask("/login-code", await port.cookie(), json, method="POST", body=b"{}")).status == 401
        assert (await port.ask("/login-code", bearer("wrong"), json, method="POST", body=b"{}")).status == 401
        assert (await port.ask("/login-code", bearer())).status == 405


def test_codes_and_sessions_end() -> None:
    now = 100.0
    sessions = Sessions(TOKEN, lambda: now)
    late, good = sessions.new_code(), sessions.new_code()
    session = sessions.redeem(good) or ""
    assert sessions.knows(session)
    now += CODE_SECONDS
    assert sessions.redeem(late) is None
    now += SESSION_SECONDS
    assert not sessions.knows(session)


def test_codes_that_nobody_redeems_are_few() -> None:
    sessions = Sessions(TOKEN)
    codes = [sessions.new_code() for _ in range(MOST_CODES + 1)]
    assert sessions.redeem(codes[0]) is None
    assert sessions.redeem(codes[1])


@asynchronous
async def test_text_from_people_never_becomes_markup() -> None:
    hostile = Pretended([run(HOSTILE, error_reason=HOSTILE)], teacher(HOSTILE))
    async with open_port(hostile) as port:
        body = (await port.ask("/", bearer())).body
    assert body.count("&lt;script&gt;") == 3
    assert "<script" not in body.lower()
    assert "/secret" not in body


@asynchronous
async def test_the_page_has_neither_scripts_nor_styles_of_its_own() -> None:
    async with open_port(Pretended([run("r")], teacher("t"))) as port:
        page = (await port.ask("/", bearer())).body
        style = await port.ask("/style.css")
    assert not re.search(r"<script|<style|\sstyle=|\son\w+=|javascript:", page, re.IGNORECASE)
    assert not re.search(r"(href|src)=\"(?!/)", page)
    assert (style.status, style.headers["content-type"]) == (200, "text/css; charset=utf-8")


@asynchronous
async def test_the_page_tells_of_teacher_and_runs() -> None:
    async with open_port(Pretended([run("distill_a", seconds_remaining=90.0)], teacher("Qwen3"))) as port:
        body = (await port.ask("/", bearer())).body
    for text in ("Qwen3", "READY", "distill_a", "RUNNING", "3 / 10"):
        assert text in body
