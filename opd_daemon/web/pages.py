"""What the web port shows, and to whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

import opd_daemon
from opd_daemon.readable import duration
from opd_daemon.web.sessions import CODE_SECONDS, SESSION_SECONDS, Sessions

if TYPE_CHECKING:
    from opd_daemon.runs.manager import RunManager
    from opd_daemon.teacher import TeacherService

COOKIE = "opd_session"
SHOWN_RUNS = 50
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Shown:
    """Where the pages' content comes from. `metrics` gives the figures in Prometheus' text format."""

    runs: RunManager
    teacher: TeacherService
    metrics: Callable[[], Awaitable[bytes]]


class Pages:
    """The routes. `/healthz`, `/login` and the style are open to all; the rest is for those `sessions` knows."""

    def __init__(self, shown: Shown, sessions: Sessions) -> None:
        self._shown = shown
        self._sessions = sessions
        self._style = files("opd_daemon.web").joinpath("templates/style.css").read_text(encoding="utf-8")
        self._templates = Environment(
            loader=PackageLoader("opd_daemon.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._templates.filters["duration"] = duration

    def app(self) -> Starlette:
        """The application that serves the routes."""
        return Starlette(
            routes=[
                Route("/", self._status),
                Route("/metrics", self._metrics),
                Route("/healthz", self._health),
                Route("/style.css", self._css),
                Route("/login", self._login),
                Route("/login-code", self._login_code, methods=["POST"]),
            ]
        )

    async def _health(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _css(self, _request: Request) -> Response:
        return Response(self._style, media_type="text/css")

    async def _metrics(self, request: Request) -> Response:
        if not self._admits(request):
            return _unauthorized("send the header 'Authorization: Bearer <token>'")
        return Response(await self._shown.metrics(), media_type=PROMETHEUS)

    async def _status(self, request: Request) -> Response:
        if not self._admits(request):
            return self._locked("This page is for whoever runs the daemon.")
        runs, more = await self._shown.runs.list(page_size=SHOWN_RUNS)
        return self._page(
            "status.html",
            version=opd_daemon.__version__,
            now=datetime.now(UTC),
            teacher=self._shown.teacher.info,
            teacher_state=self._shown.teacher.state,
            failure=self._shown.teacher.failure,
            queued_tokens=self._shown.teacher.queued_tokens,
            runs=runs,
            more=bool(more),
        )

    async def _login(self, request: Request) -> Response:
        session = self._sessions.redeem(request.query_params.get("code", ""))
        if session is None:
            return self._locked("This link was used before or is too old.")
        answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        answer.set_cookie(COOKIE, session, max_age=int(SESSION_SECONDS), httponly=True, samesite="strict")
        return answer

    async def _login_code(self, request: Request) -> Response:
        # A cookie doesn't do: a page must not be able to make links that open further browsers.
        if not self._sessions.holds_token(request.headers.get("authorization", "")):
            return _unauthorized("send the header 'Authorization: Bearer <token>'")
        return JSONResponse({"code": self._sessions.new_code(), "seconds": int(CODE_SECONDS)})

    def _admits(self, request: Request) -> bool:
        authorization = request.headers.get("authorization")
        if authorization is not None:
            return self._sessions.holds_token(authorization)
        return self._sessions.knows(request.cookies.get(COOKIE, ""))

    def _locked(self, why: str) -> Response:
        return self._page("locked.html", HTTPStatus.UNAUTHORIZED, why=why)

    def _page(self, name: str, status: int = HTTPStatus.OK, **values: object) -> Response:
        return HTMLResponse(self._templates.get_template(name).render(values), status)


def _unauthorized(cure: str) -> Response:
    return PlainTextResponse(f"{cure}\n", HTTPStatus.UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"})
