"""What is measured of this machine: fitted, kept, found again, and never in the way of a plan."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_daemon.config import parse_config
from opd_daemon.distill import batches, evaluation, footprint, live_preflight, workload
from opd_daemon.distill.machines import named_machine, this_machine
from opd_daemon.distill.planning import RunFacts, plan
from opd_daemon.distill.rates import MeasuredRates, Pair, features, fit
from opd_daemon.distill.shape import shape_of
from opd_daemon.distill.workload import Decode, Forward, Update
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import read_folder
from opd_daemon.plugins import PluginRegistry
from opd_daemon.runs import calibration
from opd_daemon.runs.calibration import Calibrations, key_of
from opd_daemon.runs.planner import Planner
from opd_daemon.runs.plans import PlanRequest, does_not_fit
from opd_daemon.teacher import TeacherService, engine, generation, scoring, sharing
from opd_daemon.types import CacheStats
from tests.sparse import write_sparse_model

KINDS = ("sample", "write", "score", "learn", "update", "compare")
RATES = MeasuredRates(
    {
        "sample": [0.0] * 6 + [1e-6],
        "write": [0.0] * 7,
        "score": [0.1, 0, 0, 0, 0],
        "learn": [0.0, 0, 1e-5, 0, 0],
        "update": [0.01, 0, 0],
        "compare": [0.0] * 5,
    },
    start=2.0,
    read_bytes=1e9,
    hash_bytes=1e9,
)


@pytest.fixture
def request_(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> PlanRequest:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(12)))
    values = {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(rows),
        "num_steps": 4,
        "max_generation_tokens": 8,
    }
    return PlanRequest(parse_config(values), PluginRegistry.discover().trainer("on_policy"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[RunFacts]:
    """What would have been measured; each answer is the same."""
    asked: list[RunFacts] = []

    def answer(facts: RunFacts) -> MeasuredRates:
        asked.append(facts)
        return RATES

    monkeypatch.setattr(calibration, "_measure", answer)
    return asked


def planner(file: Path) -> Planner:
    return Planner(Calibrations(file), file.parent, lambda: CacheStats(limit_bytes=1 << 30))


def facts_of(request: PlanRequest, **changes: Any) -> RunFacts:
    config = request.config.model_copy(update=changes)
    return RunFacts.read(config, request.trainer, this_machine(), loaded=False)


def test_a_fit_finds_what_made_the_numbers(tiny_student: Path, tiny_teacher: Path) -> None:
    pair = Pair(*(shape_of(read_folder(path)) for path in (tiny_student, tiny_teacher)), 0, 1000, 2, exact=True)
    true = [0.01, 0.002, 3e-6, 0.0, 5e-5]
    items = [Forward(size, length, rows) for size, length, rows in ((8, 64, 32), (8, 16, 64), (2, 64, 8), (1, 9, 4))]
    items += [Forward(4, 128, 1), Forward(3, 33, 99), Forward(1, 500, 10)]
    pairs = [pair, replace(pair, student=replace(pair.student, layers=6))]
    rows = [features("learn", item, layers) for item in items for layers in pairs]
    seconds = [sum(weight * value for weight, value in zip(true, row, strict=True)) for row in rows]
    found = fit(rows, seconds)
    assert all(weight >= 0 for weight in found)
    for row, wanted in zip(rows, seconds, strict=True):
        assert sum(weight * value for weight, value in zip(found, row, strict=True)) == pytest.approx(wanted, rel=0.01)


def test_every_kind_of_work_has_its_features(request_: PlanRequest) -> None:
    pair = facts_of(request_).pair
    items = {"update": Update(2), "sample": Decode(4, 10, 8, 2), "write": Decode(4, 10, 8, 4)}
    for kind in KINDS:
        item = items.get(kind, Forward(2, 10, 8))
        assert len(features(kind, item, pair)) == len(RATES.weights[kind])  # type: ignore[arg-type, index]
        assert RATES.seconds(kind, item, pair) >= 0  # type: ignore[arg-type]


def test_blocks_without_an_adapter_are_learned_through_one_way_only(request_: PlanRequest) -> None:
    pair = facts_of(request_).pair
    half = replace(pair, student=replace(pair.student, layers=8), adapted=4)
    whole, other = (features("learn", Forward(2, 32, 8), entry) for entry in (replace(half, adapted=8), half))
    assert [whole[0], whole[-1]] == [other[0], other[-1]]
    assert other[1:4] == pytest.approx([0.75 * value for value in whole[1:4]])


def test_a_machine_is_measured_once_and_never_unasked(
    tmp_path: Path, request_: PlanRequest, measured: list[RunFacts]
) -> None:
    file = tmp_path / "calibration.json"
    assert not planner(file).plan(request_).calibrated
    assert not measured
    found = planner(file).plan(replace(request_, measure=True))
    assert found.calibrated
    assert dict(found.phases)["train"] > 0
    assert any("measured on this machine" in line for line in found.assumptions)
    assert planner(file).plan(request_).calibrated
    assert len(measured) == 1


def test_what_changes_the_speed_is_measured_again(request_: PlanRequest) -> None:
    same = key_of(facts_of(request_))
    assert key_of(facts_of(request_, num_steps=9, batch_size=3, max_generation_tokens=30, learning_rate=1.0)) == same
    lora = request_.config.lora.model_copy(update={"rank": 3})
    assert key_of(facts_of(request_, lora=lora)) != same
    assert key_of(facts_of(request_, signal="sparse")) != same
    assert key_of(facts_of(request_, teacher_model_path=request_.config.base_model_path)) != same


def test_a_broken_file_is_measured_over(tmp_path: Path, request_: PlanRequest, measured: list[RunFacts]) -> None:
    file = tmp_path / "calibration.json"
    for content in ("{", "[]", json.dumps({key_of(facts_of(request_)): {"rates": {"of": "another version"}}})):
        file.write_text(content)
        assert Calibrations(file).rates(facts_of(request_), measure=True) == RATES
        assert Calibrations(file).rates(facts_of(request_), measure=False) == RATES
    assert len(measured) == 3


def test_a_measurement_that_fails_leaves_the_plan_with_typical_rates(
    tmp_path: Path, request_: PlanRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "calibration.json"
    for command in ((sys.executable, "-c", "raise SystemExit('no luck')"), ("/nowhere/python",)):
        monkeypatch.setattr(calibration, "COMMAND", command)
        assert not planner(file).plan(replace(request_, measure=True)).calibrated
    assert "no luck" in caplog.text
    assert not file.exists()


def test_models_that_leave_no_room_are_not_measured(
    tmp_path: Path, request_: PlanRequest, measured: list[RunFacts]
) -> None:
    huge = write_sparse_model(tmp_path / "huge", layers=40, hidden=65_536, inner=262_144, heads=512)
    facts = facts_of(request_, teacher_model_path=str(huge))
    assert Calibrations(tmp_path / "calibration.json").rates(facts, measure=True) is None
    assert not measured


def test_another_machine_is_planned_from_published_rates(
    tmp_path: Path, request_: PlanRequest, measured: list[RunFacts]
) -> None:
    plans = planner(tmp_path / "calibration.json")
    found = plans.plan(replace(request_, machine="M4 Max 64 GB", measure=True))
    assert found.machine == "M4 Max 64 GB"
    assert found.available_bytes == named_machine("M4 Max 64 GB").usable_bytes
    assert not found.calibrated
    assert not measured
    with pytest.raises(OpdError, match="1 field is not valid"):
        plans.plan(replace(request_, machine="a bigger one"))


def test_the_disk_of_this_machine_is_asked_and_of_another_is_not(
    tmp_path: Path, request_: PlanRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("opd_daemon.runs.planner.shutil.disk_usage", usage)
    plans = planner(tmp_path / "calibration.json")
    found = plans.plan(request_)
    assert not found.fits
    assert "on disk, 1.0 kB are free: it will not fit" in found.warnings[0]
    assert "will not fit" in does_not_fit(found).message
    assert asked == [tmp_path]
    assert plans.plan(replace(request_, machine="M4 Max 64 GB")).fits
    assert asked == [tmp_path]


def test_a_refusal_says_how_much_and_what_to_do(request_: PlanRequest) -> None:
    facts = facts_of(request_)
    small = replace(facts, machine=replace(facts.machine, usable_bytes=1 << 20))
    error = does_not_fit(plan(small))
    assert error.reason is Reason.OUT_OF_MEMORY
    assert "MB" in error.message
    assert "--force" in error.message


def test_plans_know_the_limits_the_daemon_and_the_worker_keep() -> None:
    limits = inspect.signature(TeacherService).parameters
    assert limits["token_budget"].default == footprint.SCORED_TOKENS
    assert limits["piece"].default == footprint.SCORED_PIECE
    assert (engine.BUFFER_BYTES, engine.HOST_BUFFER_BYTES) == (footprint.DAEMON_CACHE_BYTES, footprint.HOST_CACHE_BYTES)
    assert scoring.CHUNK_BYTES == footprint.DAEMON_CHUNK_BYTES
    assert generation.SEQUENCES_OF_ONE_CLIENT == workload.TEACHER_DECODES
    assert generation.PREFILL_SEQUENCES == footprint.JOINING
    assert sharing.WORTH == workload.SHARING_WORTH
    assert evaluation.SHOWN_ANSWERS == workload.SHOWN_ANSWERS
    assert live_preflight.COMPLETIONS == workload.CHECKED
    assert live_preflight.STUDENT_TOKENS == workload.CHECKED_TOKENS
    for length in (1, 16, 17, 150, 662, 2049):
        assert batches._width(length) == workload._padded(length)


def test_this_machine_is_measured_with_the_runs_own_parts(request_: PlanRequest) -> None:
    command = [sys.executable, "-m", "opd_daemon.runs.measurement"]
    config = request_.config.model_dump_json().encode()
    done = subprocess.run(command, input=config, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rates = MeasuredRates(**json.loads(done.stdout.splitlines()[-1]))
    assert set(rates.weights) == set(KINDS)
    pair = facts_of(request_).pair
    for kind, item in (("learn", Forward(2, 32, 16)), ("score", Forward(2, 32, 16)), ("sample", Decode(2, 16, 8, 2))):
        assert 1e-4 < rates.seconds(kind, item, pair) < 60  # type: ignore[arg-type]
