"""`opd sweep` and `opd report` from the command line to the files they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from opd_daemon.cli import exits
from opd_daemon.cli.sweep import conclusions, read_variations, write_outcomes
from opd_daemon.client import LocalDaemon
from opd_daemon.client.sweep import Cell, Outcome
from opd_daemon.config import parse_config
from opd_daemon.distill.report.measures import Estimate
from opd_daemon.errors import OpdError
from opd_daemon.types import RunState
from tests.cli.conftest import Opd


def test_values_are_written_as_in_yaml() -> None:
    assert read_variations(["temperature=1, 2.5", "divergence=forward_kl,jsd", "lora={rank: 2},{rank: 8}"]) == {
        "temperature": [1, 2.5],
        "divergence": ["forward_kl", "jsd"],
        "lora": [{"rank": 2}, {"rank": 8}],
    }


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (["temperature"], "write it as"),
        (["temperature="], "write it as"),
        (["temperature=1,,2"], "write it as"),
        (["=1"], "write it as"),
        (["temperature=[1"], "write it as"),
        (["seed=1", "seed=2"], "given before"),
        (["run_id=a,b"], "names the runs"),
    ],
)
def test_what_can_not_be_varied_is_one_line(written: list[str], complaint: str) -> None:
    with pytest.raises(OpdError, match=complaint) as found:
        read_variations(written)
    assert "\n" not in str(found.value)


def test_a_wrong_value_names_its_flag(opd: Opd, config_file: Path) -> None:
    outcome = opd("sweep", config_file, "--vary", "temperature=1,-2")
    assert outcome.code == exits.USAGE
    assert "--vary temperature=-2" in outcome.err


def test_a_dry_run_shows_the_plan_and_starts_nothing(opd: Opd, config_file: Path) -> None:
    before = opd("runs", "--json").json
    outcome = opd("sweep", config_file, "--vary", "temperature=1,2", "--vary", "learning_rate=1e-3,1e-2", "--dry-run")
    assert outcome.code == exits.OK, outcome.err
    assert "run-4" in outcome.out
    assert "for 4 runs one after another" in outcome.err
    assert opd("runs", "--json").json == before


def test_a_sweep_from_grid_to_picture_and_again_at_once(opd: Opd, config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = (
        "sweep",
        config_file,
        "--vary",
        "learning_rate=1e-3,1e-2",
        "--name",
        "rates",
        "--output",
        folder,
        "--yes",
    )
    outcome = opd(*command)
    assert outcome.code == exits.OK, outcome.err
    for words in ("rates-1", "rates-2", "learning_rate=1e-2", "REVERSE KL", "lowest Reverse KL: rates-"):
        assert words in outcome.out
    assert "run 2 of 2, rates-2: learning_rate=1e-2" in outcome.err
    written = json.loads((folder / "sweep.json").read_text())
    assert [entry["state"] for entry in written["cells"]] == ["SUCCEEDED", "SUCCEEDED"]
    first, second = written["cells"]
    assert first["measures"]["validation_kl"]["value"] <= second["measures"]["validation_kl"]["value"]
    assert written["best"]["validation_kl"]["run_id"] == first["run_id"]
    assert f"lowest Validation KL: {first['run_id']}" in outcome.out
    assert (folder / "sweep.csv").read_text().count("\n") == 3
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sweep.svg").read_text().startswith("<svg")

    again = opd(*command)
    assert again.code == exits.OK
    assert "run 1 of 2" not in again.err
    assert again.out.splitlines()[-5:] == outcome.out.splitlines()[-5:]


def test_a_run_that_failed_is_in_the_table_with_its_reason(tmp_path: Path) -> None:
    config = parse_config({"base_model_path": "/s", "teacher_model_path": "/t", "prompts_path": "/p"})
    cells = [Cell(f"s-{number}", {"temperature": number, "divergence": "$x_1$ <b>"}, config) for number in (1, 2, 3)]
    estimates = {"reverse_kl": Estimate(1.0, 0.1), "agreement": Estimate(0.5, 0.02)}
    outcomes = [
        Outcome(cells[0], RunState.SUCCEEDED, "", 4, 10.0, estimates),
        Outcome(cells[1], RunState.SUCCEEDED, "", 4, 10.0, {**estimates, "reverse_kl": Estimate(1.05, 0.1)}),
        Outcome(cells[2], RunState.FAILED, "it broke", 1),
    ]
    lines = list(conclusions(outcomes))
    assert "lowest Reverse KL: s-1 (temperature=1, divergence=$x_1$ <b>); within noise of it: s-2" in lines
    assert "s-3 is FAILED: it broke" in lines
    written = write_outcomes("s", outcomes, tmp_path / "s")
    assert [path.name for path in written] == ["sweep.json", "sweep.csv", "sweep.svg", "sweep.png"]
    picture = (tmp_path / "s" / "sweep.svg").read_text()
    assert "failed" in picture
    assert "$x_1$ &lt;b&gt;" in picture
    other = replace(outcomes[1], criterion=("teacher", "forward_kl"))
    differing = [replace(entry, estimates={"validation_kl": Estimate(1.0)}) for entry in (outcomes[0], other)]
    assert next(conclusions(differing)).startswith("the validation KLs are different divergences")
    nothing = write_outcomes("s", outcomes[2:], tmp_path / "none")
    assert [path.name for path in nothing] == ["sweep.json", "sweep.csv"]


def test_a_report_is_downloaded_with_its_pictures(
    opd: Opd, daemon: LocalDaemon, config_file: Path, tmp_path: Path
) -> None:
    assert opd("distill", config_file, "--new", "--set", "run_id=to-report").code == exits.OK
    page, pictures = tmp_path / "deep" / "page.html", tmp_path / "pictures"
    outcome = opd("report", "to-report", "--output", page, "--pictures", pictures)
    assert (outcome.code, outcome.out) == (exits.OK, f"{page}\n")
    assert page.read_bytes() == daemon.home.run("to-report").report.read_bytes()
    assert (pictures / "reverse_kl.png").is_file()
    assert not list(page.parent.glob(".*"))
    unknown = opd("report", "nobody")
    assert unknown.code == exits.USAGE


def test_a_sweep_that_will_not_fit_starts_nothing(opd: Opd, config_file: Path) -> None:
    before = opd("runs", "--json").json
    small = ("--set", "worker_memory_limit_bytes=1000000")
    command = ("sweep", config_file, "--vary", "seed=1,2", "--name", "large", "--yes", *small)
    outcome = opd(*command)
    assert outcome.code == exits.FAILED
    assert "large-1, large-2 will not fit;" in outcome.err
    assert opd("runs", "--json").json == before
    assert opd(*command, "--dry-run").code == exits.OK
