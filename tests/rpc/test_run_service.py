"""Runs over the wire: lists that clients can take, and a cursor from which nothing is missed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest

from opd_daemon.distill.adapter import CONFIG, WEIGHTS, adapter_files
from opd_daemon.distill.checkpoints import Checkpoints
from opd_daemon.distill.peft import PEFT_WEIGHTS
from opd_daemon.errors import OpdError, Reason
from opd_daemon.rpc.access import Caller, caller
from opd_daemon.rpc.interceptor import Context
from opd_daemon.rpc.run_service import CHUNK_BYTES, LIST_BYTES, RunServicer, _thinned
from opd_daemon.runs.states import state_event
from opd_daemon.store import Store
from opd_daemon.types import RunState
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.wire.runs import config_to_proto
from tests.asynchronous import asynchronous
from tests.distill.written_run import run_of, write_run
from tests.runs.daemon import Daemon, Stage, checkpoint, with_run

CONTEXT = cast(Context, None)
NONE = cast(Any, None)


def servicer(daemon: Daemon) -> RunServicer:
    caller.set(Caller())
    return RunServicer(daemon.runs, daemon.events, NONE, uploads=NONE, roots=NONE)


@asynchronous
async def test_a_request_that_comes_again_gets_a_cursor_before_its_run(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        service = servicer(daemon)
        await daemon.create()
        request = pb.CreateRunRequest(request_id="once", config=config_to_proto(daemon.stage.values()))
        first = await service.CreateRun(request, CONTEXT)
        await daemon.create()
        again = await service.CreateRun(request, CONTEXT)
        assert again.run.run_id == first.run.run_id
        for answer in (first, again):
            events, _ = await daemon.events.read(partial(Store.events_after, revision=answer.revision))
            told = [event.payload["state"] for event in events if event.run_id == first.run.run_id]
            assert told[0] == "PENDING"


@asynchronous
async def test_a_list_of_large_runs_comes_in_pages_that_clients_take(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        service = servicer(daemon)
        names = [await daemon.create(run_id=f"r{number}", eval_tasks=200_000 * "x") for number in range(12)]
        found, token = [], ""
        while not found or token:
            answer = await service.ListRuns(pb.ListRunsRequest(page_size=500, page_token=token), CONTEXT)
            assert answer.ByteSize() < 2 * LIST_BYTES
            assert answer.runs
            found += [run.run_id for run in answer.runs]
            token = answer.next_page_token
        assert found == names[::-1]


ADAPTER = (CONFIG, WEIGHTS, PEFT_WEIGHTS)


def save_best(daemon: Daemon, letter: bytes, names: Sequence[str] = ADAPTER) -> Path:
    def fill(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(letter * (CHUNK_BYTES + 1))

    return Checkpoints(daemon.stage.home.run("r").checkpoints, keep_last=1).save_named("best", fill)


async def best(daemon: Daemon) -> AsyncGenerator[pb.DownloadAdapterResponse]:
    request = pb.DownloadAdapterRequest(run_id="r", choice=pb.ADAPTER_CHOICE_BEST)
    async for piece in servicer(daemon).DownloadAdapter(request, CONTEXT):
        yield piece


@pytest.mark.parametrize("kept", [ADAPTER, (CONFIG, WEIGHTS)])
@asynchronous
async def test_an_adapter_that_is_replaced_while_it_is_sent_is_sent_as_it_was(
    tmp_path: Path, kept: Sequence[str]
) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        await daemon.start(run_id="r")
        path = save_best(daemon, b"a")
        await daemon.runs.report("r", with_run(checkpoint(1, path, is_best=True), "r"))
        sent: dict[str, bytes] = {}
        async with aclosing(best(daemon)) as pieces:
            async for piece in pieces:
                if not sent:
                    save_best(daemon, b"b", kept)
                assert piece.offset == len(sent.get(piece.file_name, b""))
                assert piece.file_bytes == CHUNK_BYTES + 1
                sent[piece.file_name] = sent.get(piece.file_name, b"") + piece.data
        assert sent == dict.fromkeys(ADAPTER, b"a" * (CHUNK_BYTES + 1))


@asynchronous
async def test_an_adapter_that_is_replaced_while_it_is_opened_is_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        await daemon.start(run_id="r")
        path = save_best(daemon, b"a")
        await daemon.runs.report("r", with_run(checkpoint(1, path, is_best=True), "r"))
        letters = iter([(b"b", ADAPTER), (b"c", (CONFIG, WEIGHTS))])

        def found_and_replaced(folder: Path) -> list[Path]:
            files = adapter_files(folder)
            for letter, names in islice(letters, 1):
                save_best(daemon, letter, names)
            return files

        monkeypatch.setattr("opd_daemon.rpc.run_service.adapter_files", found_and_replaced)
        async with aclosing(best(daemon)) as pieces:
            sent = {(piece.file_name, piece.data[:1]) async for piece in pieces}
        assert sent == {(CONFIG, b"c"), (WEIGHTS, b"c")}
        monkeypatch.undo()
        shutil.rmtree(path)
        with pytest.raises(OpdError) as caught:
            await anext(best(daemon))
        assert caught.value.reason is Reason.CHECKPOINT_NOT_FOUND


@asynchronous
async def test_a_report_that_is_written_anew_while_it_is_sent_is_sent_as_it_was(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run = run_of(3, state=RunState.STOPPED)
        folders = write_run(daemon.stage.home, run)
        await daemon.events.commit(lambda store: store.insert_run(run, [state_event(run)], ""))
        sent: dict[str, bytes] = {}
        before: dict[str, bytes] = {}
        request = pb.DownloadReportRequest(run_id=run.run_id)
        async for piece in servicer(daemon).DownloadReport(request, CONTEXT):
            if not sent:
                before = {path.name: path.read_bytes() for path in (folders.report, *folders.pictures.iterdir())}
                shutil.rmtree(folders.pictures)
                folders.report.unlink()
            sent[piece.file_name] = sent.get(piece.file_name, b"") + piece.data
        assert len(sent) > 5
        assert sent == before


def test_rows_are_thinned_evenly() -> None:
    assert _thinned(range(10), 10) == list(range(10))
    assert _thinned(range(1000), 4) == [0, 333, 666, 999]
