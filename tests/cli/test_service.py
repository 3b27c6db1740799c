"""`opd service`: real files, with programs that stand in for launchctl and systemctl."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_daemon.cli.unit import CLOSING_SECONDS, LABEL, Unit, launchd_plist, systemd_unit
from tests.cli.conftest import Opd

HOSTILE = "/h/a b%c$d\"e'f\\g"


def unit(**changes: object) -> Unit:
    values: dict[str, object] = {"command": ("/py", "serve"), "home": Path("/h"), "stop_grace": 60.0}
    return Unit(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program on the path that notes its arguments and does what the test says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def stand_in(name: str, script: str) -> Path:
        notes = tmp_path / f"{name}.notes"
        program = programs / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n{script}\n')
        program.chmod(0o755)
        return notes

    return stand_in


def test_launchd_restarts_after_a_failure_and_waits_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_PLUGINS", "opd-trainers")
    values = plistlib.loads(launchd_plist(unit(stop_grace=90.0)))
    assert values["Label"] == LABEL
    assert values["ProgramArguments"] == ["/py", "serve"]
    assert values["KeepAlive"] == {"SuccessfulExit": False}
    assert values["RunAtLoad"] is True
    assert values["ThrottleInterval"] >= 5
    assert values["ExitTimeOut"] == 90 + CLOSING_SECONDS
    assert values["StandardErrorPath"] == "/h/logs/service.log"
    assert values["EnvironmentVariables"]["OPD_PLUGINS"] == "opd-trainers"


def test_systemd_restarts_after_a_failure_and_waits_for_checkpoints() -> None:
    lines = systemd_unit(unit(stop_grace=90.0)).decode().splitlines()
    for line in (
        'ExecStart="/py" "serve"',
        "Restart=on-failure",
        "KillMode=mixed",
        f"TimeoutStopSec={90 + CLOSING_SECONDS}",
        "StandardError=append:/h/logs/service.log",
        "WantedBy=default.target",
    ):
        assert line in lines


def test_awkward_paths_survive_both_formats() -> None:
    awkward = unit(command=("/py", "--home", HOSTILE), home=Path(HOSTILE))
    assert plistlib.loads(launchd_plist(awkward))["ProgramArguments"][2] == HOSTILE
    text = systemd_unit(awkward).decode()
    assert r'''"/h/a b%%c$$d\"e'f\\g"''' in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not on this machine")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    file = tmp_path / f"{LABEL}.service"
    file.write_bytes(systemd_unit(unit(command=(sys.executable, "serve"), home=tmp_path)))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [str(shutil.which("systemd-analyze")), "verify", "--user", str(file)]
    verdict = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (verdict.returncode, verdict.stderr) == (0, "")


def test_print_shows_the_file_and_changes_nothing(opd_alone: Opd, asked: Callable[[str, str], Path]) -> None:
    notes = asked("systemctl", "exit 1")
    said = opd_alone("service", "install", "--print", "--home", "/h", "--web-port", "8000", "--stop-grace", "5")
    assert said.code == 0
    assert "/h/logs/service.log" in said.out
    assert "8000" in said.out
    assert not notes.exists()


def test_options_that_serve_would_refuse_are_refused(opd_alone: Opd, asked: Callable[[str, str], Path]) -> None:
    assert opd_alone("service", "install", "--print", "--colour", "red").code == 2
    assert opd_alone("service", "install", "--print", "--port", "-1").code == 2
    refused = opd_alone("service", "install", "--print", "--until-stdin-closes")
    assert refused.code == 2
    assert "standard input" in refused.err


def test_systemd_is_asked_to_enable_and_start(
    opd_alone: Opd, asked: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    notes = asked("systemctl", "exit 0")
    assert opd_alone("service", "install", "--home", tmp_path / "home", "--max-runs", "2").code == 0
    assert notes.read_text().splitlines() == [
        "--user daemon-reload",
        f"--user enable {LABEL}.service",
        f"--user restart {LABEL}.service",
    ]
    file = tmp_path / ".config/systemd/user" / f"{LABEL}.service"
    assert f'"serve" "--home" "{tmp_path / "home"}" "--max-runs" "2"' in file.read_text()
    assert (tmp_path / "home" / "logs").is_dir()
    assert opd_alone("service", "uninstall").code == 0
    assert notes.read_text().splitlines()[-1] == f"--user disable --now {LABEL}.service"
    assert not file.exists()
    assert opd_alone("service", "uninstall").out == "not installed\n"


def test_launchd_is_asked_to_bootstrap_and_boot_out(
    opd_alone: Opd, asked: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    notes = asked("launchctl", "[ $1 = print ] && echo '\tpid = 42\n\tlast exit code = 1'; exit 0")
    assert opd_alone("service", "install", "--home", tmp_path / "home").code == 0
    commands = [line.split()[0] for line in notes.read_text().splitlines()]
    assert commands == ["print", "bootout", "bootstrap"]
    file = tmp_path / "Library/LaunchAgents" / f"{LABEL}.plist"
    assert plistlib.loads(file.read_bytes())["ProgramArguments"][-2:] == ["--home", str(tmp_path / "home")]
    status = opd_alone("service", "status", "--json")
    assert status.code == 0
    assert (status.json["running"], status.json["pid"], status.json["last_exit"]) == (True, 42, 1)
    assert opd_alone("service", "uninstall").code == 0
    assert not file.exists()


def test_status_tells_of_a_service_that_has_failed(
    opd_alone: Opd, asked: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    asked("systemctl", "printf 'ActiveState=failed\\nMainPID=0\\nExecMainStatus=70\\nExecMainExitTimestamp=Thu\\n'")
    status = opd_alone("service", "status", "--json")
    assert status.code == 3
    assert status.json["last_exit"] == 70
    assert (status.json["installed"], status.json["running"]) == (False, False)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_a_service_manager_the_cure_is_told(
    platform: str, opd_alone: Opd, asked: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("systemctl", "launchctl"):
        asked(name, "echo 'Failed to connect to bus' >&2; exit 1")
    failed = opd_alone("service", "install", "--home", tmp_path / "home")
    assert failed.code == 1
    assert "Failed to connect to bus" in failed.err
    assert "--print" in failed.err
    assert not list(tmp_path.rglob(f"{LABEL}.*"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    absent = opd_alone("service", "status")
    assert absent.code == 1
    assert "is not on this machine" in absent.err


def test_other_systems_are_told_so(opd_alone: Opd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    assert "plan9" in opd_alone("service", "status").err
