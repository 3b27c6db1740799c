"""`opd plan`: what a run would take, shown without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_daemon.cli import exits, output
from opd_daemon.cli.plan import show
from opd_daemon.types import Plan, PlannedBytes
from tests.cli.conftest import Opd

MAC = ("--machine", "M4 Max 64 GB")
PLAN = Plan(
    seconds=13_000.0,
    daemon_peak_bytes=21_000_000_000,
    worker_peak_bytes=31_000_000_000,
    disk_bytes=5_000_000_000,
    available_bytes=48_000_000_000,
    assumptions=("prompts of 150 tokens [on average]",),
    warnings=("it will not fit",),
    phases=(("load", 8.0), ("rollout", 9000.0), ("train", 3992.0)),
    memory=(
        PlannedBytes("daemon", "teacher weights", 18_400_000_000),
        PlannedBytes("worker", "activations", 9_000_000),
    ),
    disk=(PlannedBytes("", "checkpoints", 5_000_000_000),),
    advice=("batch_size 1: 40.0 GB instead of 52.0 GB (fits)",),
    machine="M4 Max 64 GB",
    fits=False,
)


def test_a_plan_is_shown_by_phase_and_part(opd: Opd, config_file: Path) -> None:
    before = opd("runs", "--json").json
    outcome = opd("plan", config_file, *MAC)
    assert outcome.code == exits.OK, outcome.err
    for word in (
        "M4 Max 64 GB",
        "published rates",
        "rollout",
        "score",
        "train",
        "teacher weights",
        "checkpoints",
        "fits",
    ):
        assert word in outcome.out
    assert opd("runs", "--json").json == before


def test_a_plan_is_json_for_programs(opd: Opd, config_file: Path) -> None:
    found = opd("plan", config_file, *MAC, "--json", "--set", "num_steps=100").json
    assert found["fits"] is True
    assert found["seconds"] == pytest.approx(sum(seconds for _, seconds in found["phases"]), rel=1e-3)
    assert found["peak_bytes"] == found["daemon_peak_bytes"] + found["worker_peak_bytes"]
    assert {part["process"] for part in found["memory"]} == {"daemon", "worker"}


def test_an_unknown_machine_is_wrong_usage(opd: Opd, config_file: Path) -> None:
    outcome = opd("plan", config_file, "--machine", "M4 Maxx 64 GB")
    assert outcome.code == exits.USAGE
    assert "did you mean 'M4 Max 64 GB'?" in outcome.err


def test_faults_are_placed_in_the_file(opd: Opd, config_file: Path) -> None:
    outcome = opd("plan", config_file, "--set", "base_model_path=/nowhere", *MAC)
    assert outcome.code == exits.USAGE
    assert outcome.err.startswith("opd: --set base_model_path=/nowhere: /nowhere: outside the folders clients may name")


def test_no_daemon_is_needed(opd_alone: Opd, config_file: Path) -> None:
    outcome = opd_alone("plan", config_file, *MAC)
    assert outcome.code == exits.OK, outcome.err
    assert "M4 Max 64 GB" in outcome.out


def test_what_does_not_fit_is_said_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    show(PLAN)
    shown = capsys.readouterr().out
    for words in (
        "3 h 36 min on M4 Max 64 GB",
        "69.2 %",
        "does not fit",
        "warning: it will not fit",
        "advice: batch_size 1: 40.0 GB instead of 52.0 GB (fits)",
        "150 tokens [on average]",
    ):
        assert words in shown, shown
    assert output.plain(PLAN)["phases"][1] == ["rollout", 9000.0]
