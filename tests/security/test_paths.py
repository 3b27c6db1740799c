"""Paths clients name: inside allowed folders, through no link out of them, and nothing but files and folders."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.config import parse_config
from opd_daemon.distill.data import scan_rows
from opd_daemon.distill.preflight import check_run
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.paths import LINKED_OUT, OUTSIDE, SPECIAL, AllowedRoots, Kind, open_plain
from opd_daemon.rpc.listening import Listener
from opd_daemon.rpc.server import ServeSettings, allowed_roots
from opd_daemon.types import ComparisonRequest
from tests.tiny import write_tiny_qwen2

KINDS: tuple[Kind, ...] = ("file", "folder", "new")


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "secret").write_text("secret")
    return folder


@pytest.fixture
def roots(inside: Path) -> AllowedRoots:
    return AllowedRoots.of([inside])


def test_what_lies_inside_may_be_named_also_where_it_is_missing(roots: AllowedRoots, inside: Path) -> None:
    for path in (inside, inside / "model", inside / "missing" / "deeper", inside / ("n" * 300)):
        assert roots.fault(str(path), "folder") == ""
    assert roots.fault(str(inside / "rows.jsonl"), "file") == ""
    assert roots.fault(str(inside / "new" / "output"), "new") == ""


@pytest.mark.parametrize(
    "name",
    [
        *("{inside}/../private", "{inside}/model/../../private/secret", "{inside}/..", "/", "/etc/passwd"),
        *(
            "/dev/null/x",
            "~",
            "~/.ssh",
            "//etc/passwd",
            "relative/path",
            "~no_such_user/x",
            "",
            "/none",
            "/" + 300 * "n",
        ),
    ],
)
def test_what_lies_outside_may_not(roots: AllowedRoots, inside: Path, outside: Path, name: str) -> None:
    for kind in KINDS:
        assert roots.fault(name.format(inside=inside), kind) == OUTSIDE


def test_a_neighbour_that_begins_with_the_same_name_is_outside(roots: AllowedRoots, inside: Path) -> None:
    neighbour = inside.with_name("allowed-not")
    neighbour.mkdir()
    assert roots.fault(str(neighbour), "folder") == OUTSIDE


@pytest.mark.parametrize("text", ["/a\0b", "/a\nb", "/a\rb", "/a\x1b[31mb", "/a\x7fb"])
def test_control_characters_are_no_part_of_a_path(roots: AllowedRoots, text: str) -> None:
    assert "control character" in roots.fault(text, "file")


def test_a_link_is_judged_by_where_it_leads(roots: AllowedRoots, inside: Path, outside: Path) -> None:
    (inside / "file").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)
    (inside / "chain").symlink_to(inside / "folder")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "good").symlink_to(inside / "model")
    for name in ("file", "folder", "folder/secret", "chain/secret", "folder/not/there"):
        assert roots.fault(str(inside / name), "file") == LINKED_OUT, name
    assert roots.fault(str(inside / "good"), "folder") == ""
    assert roots.fault(str(inside / "loop" / "x"), "file") == ""  # names nothing, which its reader tells
    # And a link from outside into the folder is as good as the folder.
    (outside / "in").symlink_to(inside / "model")
    assert roots.fault(str(outside / "in"), "folder") == ""


def test_a_root_that_is_a_link_holds_what_it_leads_to(inside: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(inside)
    roots = AllowedRoots.of([link])
    assert roots.fault(str(link / "model"), "folder") == roots.fault(str(inside / "model"), "folder") == ""


def test_a_folders_files_are_judged_too(roots: AllowedRoots, inside: Path, outside: Path) -> None:
    (inside / "model" / "model.safetensors").symlink_to(outside / "secret")
    assert roots.fault(str(inside / "model"), "folder") == f"model.safetensors: {LINKED_OUT}"
    (inside / "model" / "model.safetensors").unlink()
    os.mkfifo(inside / "model" / "tokenizer.json")
    assert roots.fault(str(inside / "model"), "folder") == f"tokenizer.json: {SPECIAL}"


def test_devices_pipes_and_sockets_are_refused(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(inside / "pipe")
    monkeypatch.chdir(inside)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        roots = AllowedRoots.of([inside, Path("/dev")])
        for path in (inside / "pipe", inside / "socket", Path("/dev/null"), Path("/dev/zero")):
            assert roots.fault(str(path), "file") == SPECIAL, path
            with pytest.raises(OSError, match=r"device|[Nn]o such"):
                open_plain(path).close()


def test_rows_are_never_read_from_a_pipe(tmp_path: Path) -> None:
    """Also where it took the file's place after it was judged: opening it would wait for ever."""
    os.mkfifo(tmp_path / "rows.jsonl")
    (fault,) = scan_rows(tmp_path / "rows.jsonl")
    assert isinstance(fault, str)
    assert SPECIAL in fault


def test_a_remote_daemon_allows_its_home_and_what_its_owner_names(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    narrow = AllowedRoots.default(home, [tmp_path / "models"], remote=True)
    assert narrow.folders == (Path(os.path.realpath(home.root)), Path(os.path.realpath(tmp_path / "models")))
    assert narrow.fault("~/.ssh/id_ed25519", "file") == OUTSIDE
    assert AllowedRoots.default(home).fault("~/models/teacher", "folder") == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])  # noqa: S104 - named, not listened to
def test_a_daemon_other_machines_can_reach_leaves_out_its_owners_folders(tmp_path: Path, host: str) -> None:
    home, models = Home(tmp_path / "home"), tmp_path / "models"
    roots = allowed_roots(ServeSettings(home=home, listener=Listener(host, 1), allowed_roots=(models,)))
    assert roots == AllowedRoots.of([home.root, models])
    assert roots.fault("~/models/teacher", "folder") == OUTSIDE


@pytest.mark.parametrize("listener", [None, Listener("127.0.0.1", 1), Listener("::1", 1)])
def test_a_daemon_of_this_machine_alone_allows_its_owners_folders(tmp_path: Path, listener: Listener | None) -> None:
    roots = allowed_roots(ServeSettings(home=Home(tmp_path), listener=listener))
    assert roots.fault("~/models/teacher", "folder") == ""


def test_a_daemon_started_in_the_root_folder_does_not_allow_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert AllowedRoots.default(Home(tmp_path)).fault("/etc/passwd", "file") == OUTSIDE


def test_a_run_outside_is_told_field_by_field_and_nothing_there_is_touched(
    roots: AllowedRoots, inside: Path, outside: Path
) -> None:
    values = {
        "base_model_path": str(outside),
        "teacher_model_path": str(outside),
        "student_adapter_path": str(outside),
        "output_adapter_path": str(outside / "out"),
        "prompts_path": str(outside / "secret"),
        "validation_prompts_path": str(outside / "secret"),
    }
    outside.chmod(0o000)
    try:
        faults = check_run(parse_config(values), None, roots)
    finally:
        outside.chmod(0o700)
    assert {fault.field: fault.description for fault in faults} == {
        f"config.{name}": f"{value}: {OUTSIDE}" for name, value in values.items()
    }


# A daemon that allows one folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paths")
    for name in ("allowed/teacher", "allowed/student", "private/teacher"):
        write_tiny_qwen2(place / name, seed=1)
    rows = "".join(json.dumps({"prompt": f"Tell me about {number}."}) + "\n" for number in range(8))
    for name in ("allowed", "private"):
        (place / name / "rows.jsonl").write_text(rows)
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[Client]:
    """Of a daemon whose owner works somewhere else."""
    patch = pytest.MonkeyPatch()
    (place / "user").mkdir()
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        patch.setenv(name, str(place / "user"))
    patch.chdir("/")
    # Where temporary files lie is allowed on this machine; these tests lie there too.
    daemon = LocalDaemon(Home(place / "home"), allowed_roots=[place / "allowed"])
    patch.setattr("opd_daemon.client.local.sys.executable", str(_without_tmp(place)))
    with daemon, daemon.client() as client:
        patch.undo()
        yield client


def _without_tmp(place: Path) -> Path:
    """The interpreter, in whose daemons /tmp is not allowed just for being /tmp."""
    script = place / "python"
    code = (
        "import sys, opd_daemon.paths as paths; paths._of_the_owner = lambda: iter(()); "
        "from opd_daemon.cli.main import main; sys.argv = ['opd', *sys.argv[3:]]; main()"
    )
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    script.chmod(0o700)
    return script


def values(place: Path, **changes: str) -> dict[str, Any]:
    allowed = place / "allowed"
    paths = {
        "teacher_model_path": str(allowed / "teacher"),
        "base_model_path": str(allowed / "student"),
        "prompts_path": str(allowed / "rows.jsonl"),
    }
    return {**paths, "num_steps": 1, "max_generation_tokens": 4, **changes}


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("teacher_model_path", "private/teacher"),
        ("base_model_path", "private/teacher"),
        ("student_adapter_path", "private/teacher"),
        ("output_adapter_path", "private/new"),
        ("prompts_path", "private/rows.jsonl"),
        ("validation_prompts_path", "private/rows.jsonl"),
        ("prompts_path", "allowed/../private/rows.jsonl"),
        ("prompts_path", "private/not there"),
    ],
)
def test_create_run_refuses_a_path_outside(client: Client, place: Path, field: str, name: str) -> None:
    with pytest.raises(OpdError) as refused:
        client.create_run(values(place, **{field: f"{place}/{name}"}), validate_only=True)
    assert refused.value.reason is Reason.INVALID_RUN_CONFIG
    (violation,) = refused.value.violations
    assert violation.field == f"config.{field}"
    assert OUTSIDE in violation.description


@pytest.mark.parametrize("name", ["private/teacher", "allowed/link", "private/not there", "allowed/../private/teacher"])
def test_load_teacher_refuses_a_path_outside(client: Client, place: Path, name: str) -> None:
    link = place / "allowed" / "link"
    if not link.is_symlink():
        link.symlink_to(place / "private" / "teacher")
    with pytest.raises(OpdError) as refused:
        list(client.load_teacher(f"{place}/{name}"))
    assert (refused.value.reason, refused.value.code) == (Reason.PATH_NOT_ALLOWED, Code.PERMISSION_DENIED)
    assert [violation.field for violation in refused.value.violations] == ["model_path"]
    assert client.teacher()[0] == "UNLOADED"


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://127.0.0.1:1/model",
        "file:///etc/passwd",
        "s3://bucket/model",
        "hf://org/model",
        "//127.0.0.1/share",
        "user@host:model",
        "org/model/../../x",
        "org/model?revision=x",
        "org/model@main",
    ],
)
def test_addresses_are_no_models(client: Client, place: Path, address: str) -> None:
    """None is fetched: what isn't a folder is a hub id of two plain names, or refused."""
    with pytest.raises(OpdError) as refused:
        list(client.load_teacher(address))
    assert refused.value.reason is Reason.PATH_NOT_ALLOWED
    for field in ("teacher_model_path", "base_model_path", "prompts_path", "output_adapter_path"):
        with pytest.raises(OpdError) as refused:
            client.create_run(values(place, **{field: address}), validate_only=True)
        assert OUTSIDE in refused.value.violations[0].description


def test_a_run_whose_model_became_a_link_outside_is_not_used_again(client: Client, place: Path) -> None:
    student = place / "allowed" / "moving"
    write_tiny_qwen2(student, seed=1)
    run, _ = client.create_run(values(place, base_model_path=str(student)))
    with contextlib.suppress(OpdError):  # it may have come to its end already
        client.stop(run.run_id)
    deadline = time.monotonic() + 60
    while not client.run(run.run_id)[0].state.resting:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shelf = place / "private" / "moved"
    student.rename(shelf)
    student.symlink_to(shelf)
    with pytest.raises(OpdError) as refused:
        list(client.compare(ComparisonRequest(run.run_id, ("Hello",))))
    assert refused.value.reason is Reason.PATH_NOT_ALLOWED
    assert [violation.field for violation in refused.value.violations] == ["config.base_model_path"]
    assert str(student) not in {model.path for model in client.models()}
    if client.run(run.run_id)[0].state.resumable:
        with pytest.raises(OpdError) as refused:
            client.resume(run.run_id)
        assert LINKED_OUT in refused.value.violations[0].description
