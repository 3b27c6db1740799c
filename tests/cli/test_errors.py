"""A person's mistake: one line per fault, naming flag or field, value and cure; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_daemon.cli import exits, output
from opd_daemon.cli.main import app, run
from tests.cli.conftest import Opd


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["foo"], "opd: no such command 'foo'; see 'opd --help'"),
        (["distill"], "opd distill: missing argument 'CONFIG.yaml'; see 'opd distill --help'"),
        (
            ["distill", "x", "--fo"],
            "opd distill: no such option: --fo (Possible options: --force); see 'opd distill --help'",
        ),
        (["distill", "nope.yaml"], "opd: nope.yaml: no such file"),
        (["serve", "--log-level", "loud"], "opd serve: invalid value for --log-level: 'loud' is not"),
        (["serve", "--cache-limit", "much"], "opd: --cache-limit much: not a size; write it like 500MB or 20GB"),
        (["cache", "prune", "--keep", "-3"], "opd: --keep -3: not a size; write it like 500MB or 20GB"),
        (["demo", "--trainer", "magic"], "opd: --trainer magic: the demo knows offline and on_policy"),
        (["metrics", "--stride", "-1"], "opd metrics: invalid value for '--stride'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(opd_alone: Opd, arguments: list[str], line: str) -> None:
    outcome = opd_alone(*arguments)
    assert outcome.code == exits.USAGE
    assert outcome.err.startswith(line)
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


@pytest.mark.parametrize(
    "command",
    [["runs"], ["status"], ["watch"], ["stop"], ["teacher"], ["cache"], ["plugins"], ["trainers"], ["score", "a b"]],
)
def test_without_a_daemon_every_command_says_so_with_exit_code_3(opd_alone: Opd, command: list[str]) -> None:
    outcome = opd_alone(*command)
    assert outcome.code == exits.NO_DAEMON
    assert "no daemon is running for" in outcome.err
    assert "'opd serve'" in outcome.err


def test_distill_without_a_daemon_offers_serve(opd_alone: Opd, config_file: Path) -> None:
    outcome = opd_alone("distill", config_file)
    assert outcome.code == exits.NO_DAEMON
    assert "--serve" in outcome.err


def test_an_unexpected_error_is_a_line_unless_debugging(opd_alone: Opd, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(output, "show_table", broken)
    monkeypatch.setattr("opd_daemon.client.Client.find", broken)
    outcome = opd_alone("runs")
    assert (outcome.code, outcome.out) == (exits.FAILED, "")
    assert outcome.err == "opd: unexpected ZeroDivisionError: by zero (OPD_DEBUG=1 shows where)\n"
    monkeypatch.setenv("OPD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        opd_alone("runs")


def test_ctrl_c_ends_with_130(opd_alone: Opd, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opd_daemon.client.Client.find", interrupted)
    assert opd_alone("runs").code == exits.INTERRUPTED


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_the_exit_codes(opd_alone: Opd, arguments: list[str]) -> None:
    outcome = opd_alone(*arguments)
    assert outcome.code == 0
    for command in (*app.registered_commands, *app.registered_groups):
        assert str(command.name) in outcome.out
    assert "130" in outcome.out


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from opd_daemon.cli.main import run; run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    loaded = done.stderr.rsplit("[", 1)[-1]
    for module in ("grpc", "mlx", "mlx_lm", "numpy", "pydantic", "yaml", "google.protobuf", "matplotlib"):
        assert f"'{module}'" not in loaded


def test_a_reader_that_leaves_is_no_error(opd_alone: Opd) -> None:
    command = [sys.executable, "-m", "opd_daemon.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        program.stdout.close()
        assert program.stderr is not None
        assert "Traceback" not in program.stderr.read()


def test_the_version_is_the_packages(opd_alone: Opd) -> None:
    import opd_daemon

    assert opd_alone("--version").out == f"opd {opd_daemon.__version__}\n"
    assert run(["--version"]) == 0
