"""Prompts sent to a daemon elsewhere: kept whole or not at all, within limits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import grpc
import pytest

from opd_daemon.client import Client
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.runs import uploads as room
from opd_daemon.runs.uploads import PIECE_BYTES, UploadPiece, Uploads
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1.run_pb2_grpc import RunServiceStub
from opd_daemon.wire.errors import from_rpc_error
from tests.asynchronous import asynchronous
from tests.security.conftest import Remote
from tests.tiny import write_tiny_qwen2

ROWS = b"".join(json.dumps({"prompt": f"Tell me about {number}."}).encode() + b"\n" for number in range(24))
DIGEST = hashlib.sha256(ROWS).hexdigest()


async def pieces(*data: bytes, sha256: str = "") -> AsyncIterator[UploadPiece]:
    for piece in data:
        yield UploadPiece(piece, sha256)


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


async def refusal(uploads: Uploads, sent: AsyncIterator[UploadPiece]) -> OpdError:
    with pytest.raises(OpdError) as refused:
        await uploads.receive(sent)
    return refused.value


@asynchronous
async def test_a_file_is_kept_under_its_content(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    first = await uploads.receive(pieces(ROWS[:100], ROWS[100:], sha256=DIGEST))
    again = await uploads.receive(pieces(ROWS))
    assert first == again
    assert first.path == tmp_path / "uploads" / f"{DIGEST}.jsonl"
    assert (first.sha256, first.bytes, first.path.read_bytes()) == (DIGEST, len(ROWS), ROWS)
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700
    assert names(first.path.parent) == [first.path.name]


@asynchronous
async def test_what_can_not_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path, most_bytes=1000, most_bytes_of_all=1500)
    faults = [
        (pieces(), Reason.INVALID_REQUEST),
        (pieces(b"", b""), Reason.INVALID_REQUEST),
        (pieces(b"x" * 600, b"x" * 600), Reason.INVALID_REQUEST),
        (pieces(b"x" * (PIECE_BYTES + 1)), Reason.INVALID_REQUEST),
        (pieces(b"x", sha256="0" * 64), Reason.INVALID_REQUEST),
    ]
    for sent, reason in faults:
        assert (await refusal(uploads, sent)).reason is reason
        assert names(tmp_path) == []
    await uploads.receive(pieces(b"x" * 1000))
    full = await refusal(uploads, pieces(b"y" * 900))
    assert (full.reason, full.code) == (Reason.DISK_FULL, Code.RESOURCE_EXHAUSTED)
    assert len(names(tmp_path)) == 1

    def no_space(file: IO[bytes]) -> None:
        with room._told():
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(room, "_sync", no_space)
    full = await refusal(uploads, pieces(b"y"))
    assert (full.reason, str(tmp_path) in full.message) == (Reason.DISK_FULL, False)
    assert len(names(tmp_path)) == 1


@asynchronous
async def test_uploads_at_the_same_time_have_room_together(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, most_bytes=1000, most_bytes_of_all=2500)
    began = asyncio.Barrier(4)

    async def slow(name: bytes) -> AsyncIterator[UploadPiece]:
        yield UploadPiece(name)
        await began.wait()  # by now each has looked for room
        yield UploadPiece(999 * name)

    coming = [uploads.receive(slow(name)) for name in (b"a", b"b", b"c", b"d")]
    found = await asyncio.gather(*coming, return_exceptions=True)
    assert {fault.reason for fault in found if isinstance(fault, OpdError)} == {Reason.DISK_FULL}
    assert len(names(tmp_path)) <= 2
    await uploads.receive(pieces(b"e" * 500))


@asynchronous
async def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[UploadPiece]:
        yield UploadPiece(b"x" * 1000)
        begun.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(uploads.receive(endless()))
    await begun.wait()
    assert [name.endswith(".part") for name in names(tmp_path)] == [True]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(tmp_path) == []


@asynchronous
async def test_uploads_that_fall_silent_keep_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_SILENCE", 0.1)
    uploads = Uploads(tmp_path)

    async def silent() -> AsyncIterator[UploadPiece]:
        yield UploadPiece(b"x")
        await asyncio.sleep(60)

    stalled = [asyncio.create_task(refusal(uploads, silent())) for _ in range(2 * room.AT_A_TIME)]
    await asyncio.sleep(0)
    kept = await asyncio.wait_for(uploads.receive(pieces(ROWS)), 10)
    assert kept.sha256 == DIGEST
    assert {fault.reason for fault in await asyncio.gather(*stalled)} == {Reason.DEADLINE_EXCEEDED}
    assert names(tmp_path) == [f"{DIGEST}.jsonl"]


@asynchronous
async def test_an_upload_given_up_while_another_begins_disturbs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path)
    scan = os.scandir

    def gone_since(folder: Path) -> contextlib.nullcontext[list[os.DirEntry[str]]]:
        other = folder / "other.part"
        other.write_bytes(b"x")
        with scan(folder) as found:
            entries = list(found)
        other.unlink()
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", gone_since)
    kept = await uploads.receive(pieces(ROWS))
    assert kept.sha256 == DIGEST


def test_what_a_killed_daemon_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("0123.part", f"{DIGEST}.jsonl"):
        (tmp_path / name).write_text("x")
    Uploads(tmp_path).remove_partial()
    Uploads(tmp_path / "missing").remove_partial()
    assert names(tmp_path) == [f"{DIGEST}.jsonl"]


# With a daemon elsewhere


@pytest.fixture(scope="module")
def models(remote: Remote) -> Path:
    """Models where the daemon's owner keeps them."""
    folder = remote.process.home.models
    for name, layers in (("teacher", 3), ("student", 2)):
        if not (folder / name).exists():
            write_tiny_qwen2(folder / name, seed=layers, layers=layers)
    return folder


def kept(remote: Remote) -> set[str]:
    folder = remote.process.home.uploads
    return set(names(folder)) if folder.exists() else set()


def test_a_client_uploads_a_file_and_names_it(far_client: Client, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(ROWS)
    path = far_client.upload_prompts(file)
    assert Path(path).name == f"{DIGEST}.jsonl"
    config = {
        "teacher_model_path": str(models / "teacher"),
        "base_model_path": str(models / "student"),
        "prompts_path": path,
        "max_generation_tokens": 4,
    }
    planned, _ = far_client.create_run(config, validate_only=True)
    assert planned.config["prompts_path"] == path


def test_an_empty_or_missing_file_is_told(far_client: Client, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, told in (("empty.jsonl", "1 field is not valid"), ("none.jsonl", "can't be read")):
        with pytest.raises(OpdError, match=told) as refused:
            far_client.upload_prompts(tmp_path / name)
        assert refused.value.reason is Reason.INVALID_REQUEST


def test_a_client_that_goes_away_leaves_nothing(far_client: Client, remote: Remote) -> None:
    before = kept(remote)

    def messages() -> Iterator[pb.UploadPromptsRequest]:
        yield pb.UploadPromptsRequest(data=b"x" * 1000)
        raise ConnectionError

    call: Any = RunServiceStub(far_client.channel).UploadPrompts
    with pytest.raises(grpc.RpcError) as broken:
        call(messages(), timeout=20)
    assert from_rpc_error(broken.value).reason is not Reason.INVALID_REQUEST
    for _ in range(100):
        if kept(remote) == before:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert kept(remote) == before


def write_config(folder: Path, models: Path) -> Path:
    """A run of one step, with its prompts beside it."""
    (folder / "rows.jsonl").write_bytes(ROWS)
    settings = {
        "teacher_model_path": str(models / "teacher"),
        "base_model_path": str(models / "student"),
        "prompts_path": "rows.jsonl",
        "output_adapter_path": "adapter",
        "num_steps": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_generation_tokens": 4,
        "max_validation_prompts": 2,
        "max_eval_samples": 0,
        "max_prompts": 4,
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings))
    return file


def opd(remote: Remote, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on a machine that has nothing but the remote daemon's address."""
    environment = {**os.environ, **remote.environment, "OPD_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "opd_daemon.cli", *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


def test_distil_on_another_machine(remote: Remote, models: Path, tmp_path: Path) -> None:
    """Prompts go there, the adapter comes back; nothing here is named there."""
    done = opd(remote, tmp_path, "distill", str(write_config(tmp_path, models)), "--new", "--yes")
    assert done.returncode == 0, done.stderr
    assert "adapters.safetensors" in names(tmp_path / "adapter")
    assert f"fetched: {tmp_path / 'adapter'}" in done.stderr
    assert f"{DIGEST}.jsonl" in kept(remote)


def test_a_sweep_on_another_machine(remote: Remote, models: Path, tmp_path: Path) -> None:
    """Every run's adapter comes back, and the same command again has nothing left to do."""
    command = ("sweep", str(write_config(tmp_path, models)), "--vary", "temperature=1,2", "--name", "far", "--yes")
    done = opd(remote, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    for name in ("far-1", "far-2"):
        assert "adapters.safetensors" in names(tmp_path / "adapter" / name)
    assert "sweep.png" in names(tmp_path / "far")
    again = opd(remote, tmp_path, *command)
    assert again.returncode == 0, again.stderr
    assert "run 1 of 2" not in again.stderr
