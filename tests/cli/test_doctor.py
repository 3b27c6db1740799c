"""`opd doctor`: the bad case of every check."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_daemon import blas, schema
from opd_daemon.client import LocalDaemon
from opd_daemon.doctor import home as places
from opd_daemon.doctor import installation, machine
from opd_daemon.doctor.finding import Level
from opd_daemon.home import Home
from opd_daemon.plugins import PluginRegistry
from opd_daemon.plugins.discovery import FailedPlugin
from opd_daemon.store import Store
from tests.cli.conftest import Opd

# A pid that no process can have.
NOBODY = 2**22 + 1


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.runtime.mkdir(parents=True)
    home.root.chmod(0o700)
    home.runtime.chmod(0o700)
    return home


def publish(home: Home, **changes: object) -> None:
    values = {"pid": NOBODY, "address": f"unix:{home.socket}", "token": "t", "store_id": "s", **changes}
    home.discovery.write_text(json.dumps(values))
    home.discovery.chmod(0o600)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    present = metadata.version

    def version(name: str) -> str:
        if name == "mlx-lm":
            raise metadata.PackageNotFoundError(name)
        return present(name)

    monkeypatch.setattr(metadata, "version", version)
    [_, missing] = installation.versions()
    assert missing.level is Level.ERROR
    assert "mlx-lm" in missing.text


def test_a_plugin_that_fails_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = FailedPlugin("p", "opd-p", "1", "importing p fails with ImportError: no q")
    monkeypatch.setattr(PluginRegistry, "discover", lambda: PluginRegistry((), (failed,)))
    broken, none = installation.plugins()
    assert (broken.level, none.level) == (Level.ERROR, Level.ERROR)
    assert "no q" in broken.text
    assert "opd-p" in broken.cure
    assert "opd-trainers" in none.cure


def test_a_slow_blas_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(blas, "has_cuda_build", lambda: False)
    monkeypatch.setattr(blas, "preload", lambda: None)
    monkeypatch.setattr(blas, "active", lambda: False)
    assert machine.products().level is Level.WARNING
    monkeypatch.setattr(blas, "active", lambda: True)
    monkeypatch.setattr(blas, "kernels", lambda: "Prescott")
    monkeypatch.setattr(blas, "best_kernels", lambda: "Haswell")
    found = machine.products()
    assert found.level is Level.WARNING
    assert "OPENBLAS_CORETYPE=Haswell" in found.cure
    monkeypatch.setattr(blas, "kernels", lambda: "Haswell")
    assert machine.products().level is Level.OK


def test_a_mac_without_metal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: False))
    assert machine.products().level is Level.ERROR
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: True))
    assert machine.products().level is Level.OK


def test_little_memory_and_few_files_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30, total=8 << 30))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 256))
    assert machine.memory().level is Level.WARNING
    assert machine.open_files().level is Level.WARNING


@pytest.mark.parametrize(("free", "level"), [(1 << 20, Level.ERROR), (5 << 30, Level.WARNING), (99 << 30, Level.OK)])
def test_a_disk_gets_full(free: int, level: Level, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert places.disk(home).level is level


def test_a_home_that_others_may_write_to_is_an_error(home: Home) -> None:
    assert places.folder(home).level is Level.OK
    home.runtime.chmod(0o755)
    assert "chmod 700" in places.folder(home).cure
    home.runtime.chmod(0o700)
    home.root.chmod(0o750)
    assert (places.folder(home).level, "chmod 700" in places.folder(home).cure) == (Level.WARNING, True)
    home.root.chmod(0o777)
    assert "chmod go-w" in places.folder(home).cure


def test_a_home_that_cannot_be_written_to_is_an_error(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert places.folder(home).level is Level.ERROR


def test_a_token_that_others_can_read_is_an_error(home: Home) -> None:
    publish(home)
    home.discovery.chmod(0o644)
    found = places.daemon(home)
    assert found.level is Level.ERROR
    assert "0644" in found.text


def test_a_broken_discovery_file_is_an_error(home: Home) -> None:
    home.discovery.write_text("{")
    assert places.daemon(home).level is Level.ERROR


def test_a_daemon_that_died_is_a_warning(home: Home) -> None:
    publish(home)
    home.lock.write_text(str(NOBODY))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(home.socket))
    assert places.daemon(home).level is Level.WARNING
    found = places.left_behind(home)
    assert found.level is Level.WARNING
    assert str(NOBODY) in found.text


def test_a_damaged_store_is_an_error_and_is_left_as_it_is(home: Home) -> None:
    Store(home.database).close()
    assert places.store(home).level is Level.OK
    content = bytearray(home.database.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    home.database.write_bytes(content)
    assert places.store(home).level is Level.ERROR
    assert home.database.read_bytes() == content
    home.database.write_bytes(b"no database at all" * 100)
    assert places.store(home).level is Level.ERROR


def test_a_store_of_a_newer_version_is_an_error(home: Home) -> None:
    Store(home.database).close()
    with sqlite3.connect(home.database) as database:
        database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    database.close()
    assert "upgrade" in places.store(home).cure


def test_a_model_folder_that_is_cut_off_is_a_warning(home: Home, tiny_student: Path) -> None:
    (home.models / "whole").parent.mkdir()
    (home.models / "whole").symlink_to(tiny_student)
    (home.models / "empty").mkdir()
    broken, rest = places.models(home)
    assert broken.level is Level.WARNING
    assert "empty" in broken.text
    assert broken.cure
    assert "whole" in rest.text


def test_all_is_well_with_a_live_daemon(opd: Opd, daemon: LocalDaemon) -> None:
    report = opd("doctor", "--json")
    by_subject: dict[str, Any] = {finding["subject"]: finding for finding in report.json}
    assert report.code == 0
    assert str(daemon.pid) in by_subject["daemon"]["text"]
    assert by_subject["lock"]["level"] == "ok"
    assert by_subject["store"]["level"] == "ok"


def test_errors_are_shown_with_their_cure_and_set_the_exit_code(opd_alone: Opd, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.runtime.mkdir(parents=True, mode=0o700)
    home.discovery.write_text("{")
    said = opd_alone("doctor")
    assert said.code == 1
    assert "✗" in said.out
    assert "→ delete it" in said.out
    assert said.out.endswith("\n1 error, 1 warning\n")


def test_doctor_changes_nothing(opd_alone: Opd, tmp_path: Path) -> None:
    assert opd_alone("doctor", "--json").code == 0
    assert not (tmp_path / "home").exists()
