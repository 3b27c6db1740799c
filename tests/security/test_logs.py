"""The daemon's log: one line an event, whatever a client puts into it, and findable by the id a client was told."""

from __future__ import annotations

import io
import json
import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

from opd_daemon import logs
from opd_daemon.client import LocalDaemon, find_endpoint
from opd_daemon.logs import EventFormatter, LineFormatter, escaped, log_to_file
from opd_daemon.v1 import run_pb2

# A fake event, a cleared screen, a line that turns right to left, separators that some editors take for line ends.
NASTY = "x\n2026-01-01 00:00:00,000 INFO opd all is well\r\x1b[2J\x00\x7f\x85\u2028\u202e\ud800"


@contextmanager
def logging_into(handler: logging.Handler) -> Iterator[logging.Logger]:
    # One that no tree of loggers knows: a lone surrogate can't be sent on to whoever collects the tests' own logs.
    logger = logging.Logger("tests.security.logs", logging.DEBUG)  # noqa: LOG001
    logger.addHandler(handler)
    yield logger


def say(logger: logging.Logger) -> None:
    logger.info("run %s began", NASTY)
    try:
        int(NASTY)
    except ValueError:
        logger.exception(NASTY, extra={"peer": NASTY})


def test_on_a_terminal_nothing_a_client_says_begins_a_line_or_moves_the_cursor() -> None:
    screen = io.StringIO()
    handler = logging.StreamHandler(screen)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    with logging_into(handler) as logger:
        say(logger)
    lines = screen.getvalue().removesuffix("\n").split("\n")
    assert [line.split(" ")[0] for line in lines[:2]] == ["INFO", "ERROR"]
    assert all(line.startswith("    ") for line in lines[2:])
    assert len(lines) > 4  # the traceback is there
    assert all(line.isprintable() for line in lines)
    assert escaped("a\nb\x1b") == r"a\nb\x1b"
    assert escaped("Grüße, 世界 🎉") == "Grüße, 世界 🎉"


def test_in_the_file_every_event_is_one_object_on_one_line() -> None:
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    handler.setFormatter(EventFormatter())
    handler.addFilter(logs._with_context)
    with logging_into(handler) as logger:
        say(logger)
    text = file.getvalue()
    assert text.count("\n") == 2
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    first, second = map(json.loads, text.splitlines())
    assert first["message"] == f"run {NASTY} began"
    assert (first["level"], first["logger"], second["peer"]) == ("INFO", "tests.security.logs", NASTY)
    assert "ValueError" in second["exc_info"]
    assert first["time"] <= second["time"]


def test_the_file_is_private_rotates_and_never_fails_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    monkeypatch.setattr(logs, "OLD_FILES", 2)
    root = logging.getLogger()
    handler = log_to_file(tmp_path / "logs")
    root.removeHandler(handler)
    try:
        with logging_into(handler) as logger:
            for number in range(100):
                logger.info("event %d", number)
            files = sorted((tmp_path / "logs").iterdir())
            assert [file.name for file in files] == [logs.FILE, f"{logs.FILE}.1", f"{logs.FILE}.2"]
            for file in files:
                assert file.stat().st_size <= 2000
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
                assert all(json.loads(line)["level"] == "INFO" for line in file.read_text().splitlines())
            monkeypatch.setattr(handler, "emit", handler.handleError)
            logger.info("nobody hears this, and nobody falls over it")
    finally:
        handler.close()


def test_what_a_service_manager_keeps_of_stderr_begins_anew_when_it_is_large(tmp_path: Path) -> None:
    script = (
        "import logging, sys; from pathlib import Path; from opd_daemon import logs\n"
        "logs.FILE_BYTES, folder = 1000, Path(sys.argv[1])\n"
        "logs.log_to_stderr('info'); logs.log_to_service_file(folder); logs.log_to_file(folder)\n"
        "for number in range(1000): logging.info('event %d', number)\n"
    )

    def stderr_size(name: str, mode: Literal["ab", "wb"] = "ab") -> int:
        with (tmp_path / name).open(mode) as file:
            subprocess.run([sys.executable, "-c", script, str(tmp_path)], stderr=file, check=True, timeout=60)
        assert (tmp_path / name).read_text().endswith("event 999\n")
        return (tmp_path / name).stat().st_size

    assert stderr_size(logs.SERVICE_FILE) <= 1000 * logs.OLD_FILES + 100
    assert stderr_size(logs.SERVICE_FILE, "wb") <= 1000 * logs.OLD_FILES + 100
    assert stderr_size("a person's own.log") > 2000 * logs.OLD_FILES


def events(daemon: LocalDaemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (daemon.home.logs / logs.FILE).read_text().splitlines()]


def test_a_refused_call_is_found_by_the_id_its_caller_was_told(local: LocalDaemon) -> None:
    endpoint = find_endpoint(local.home)
    auth = (("authorization", f"Bearer {endpoint.token}"),)
    request = run_pb2.GetRunRequest(run_id="nope\n{}").SerializeToString()
    with grpc.insecure_channel(endpoint.address) as channel:
        call: Any = channel.unary_unary("/opd_daemon.v1.RunService/GetRun")
        ids = []
        for metadata in (auth, (), auth):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=metadata, timeout=10)
            assert isinstance(refused.value, grpc.Call)
            ids.append(dict(refused.value.trailing_metadata())["opd-request-id"])
    assert len(set(ids)) == 3
    found = {event["request_id"]: event for event in events(local) if event["request_id"] in ids}
    assert [(found[told]["code"], found[told]["run_id"]) for told in ids] == [
        ("NOT_FOUND", "nope\n{}"),
        ("UNAUTHENTICATED", ""),
        ("NOT_FOUND", "nope\n{}"),
    ]


def test_answers_carry_an_id_too(local: LocalDaemon) -> None:
    endpoint = find_endpoint(local.home)
    auth = (("authorization", f"Bearer {endpoint.token}"),)
    with grpc.insecure_channel(endpoint.address) as channel:
        unary: Any = channel.unary_unary("/opd_daemon.v1.RunService/ListRuns")
        _, call = unary.with_call(b"", metadata=auth, timeout=10)
        assert len(dict(call.trailing_metadata())["opd-request-id"]) == 16


def test_no_token_is_logged(local: LocalDaemon) -> None:
    endpoint = find_endpoint(local.home)
    with grpc.insecure_channel(endpoint.address) as channel:
        call: Any = channel.unary_unary("/opd_daemon.v1.RunService/GetRun")
        with pytest.raises(grpc.RpcError):
            call(b"", metadata=(("authorization", f"Bearer {endpoint.token}"),), timeout=10)
    assert events(local)
    for file in local.home.logs.iterdir():
        assert find_endpoint(local.home).token not in file.read_text()


def test_a_client_that_leaves_during_a_write_is_no_fault_of_ours() -> None:
    script = (
        "import logging; from opd_daemon.logs import log_to_stderr; log_to_stderr('info')\n"
        "for text in ('ExecuteBatchError raised in core by servicer method [/x]', 'Unexpected fault'):\n"
        "    logging.getLogger('grpc._cython.cygrpc').error(text)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    (line,) = said.stderr.splitlines()
    assert line.endswith("Unexpected fault")
