"""Plans: what a run computes, what it holds, how long it takes, and what to change; from headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from opd_daemon.config import LoraConfig, RunConfig, parse_config
from opd_daemon.distill.adapter import WEIGHTS
from opd_daemon.distill.checkpoints import OPTIMIZER
from opd_daemon.distill.machines import Machine, machine_names, named_machine, this_machine
from opd_daemon.distill.peft import PEFT_WEIGHTS
from opd_daemon.distill.planning import DiskSpace, RunFacts, plan
from opd_daemon.distill.shape import adapter_parameters, in_float32, shape_of, stored_parameters
from opd_daemon.distill.student import Student
from opd_daemon.distill.workload import CHECKED, Decode, Forward, Lengths, Regime, measure_lengths, workload_of
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import read_folder
from opd_daemon.trainer import TrainerInfo
from opd_daemon.types import Plan
from tests.distill.test_adapter_folder import only_peft, written
from tests.sparse import write_sparse_model

GB = 1e9


def trainer(name: str = "on_policy", *, uses_teacher: bool = True, **sources: float) -> TrainerInfo:
    def shares(config: RunConfig, options: BaseModel) -> dict[str, float]:
        return sources or {"student": 1.0}

    factory: Any = None
    return TrainerInfo(name, "1", "", factory, uses_teacher=uses_teacher, sources=shares)


ON_POLICY = trainer()
OFFLINE = trainer("offline", teacher=1.0)
DATASET = trainer("dataset", data=1.0)
SFT = trainer("sft", uses_teacher=False, data=1.0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}", "completion": "yes"}) + "\n" for i in range(40)))
    return file


@pytest.fixture
def settings(tiny_teacher: Path, tiny_student: Path, rows: Path) -> dict[str, Any]:
    return {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(rows),
        "max_generation_tokens": 16,
        "num_steps": 10,
    }


def facts(settings: dict[str, Any], info: TrainerInfo = ON_POLICY, **changes: Any) -> RunFacts:
    config = parse_config({**settings, **changes})
    return RunFacts.read(config, info, this_machine(), loaded=False)


def parts(found: Plan, process: str) -> dict[str, int]:
    return {part.name: part.bytes for part in found.memory if part.process == process}


# Shapes


def test_a_shape_is_read_from_the_headers(tiny_student: Path) -> None:
    folder = read_folder(tiny_student)
    shape = shape_of(folder)
    assert (shape.layers, shape.hidden, shape.inner, shape.heads, shape.kv_heads) == (2, 64, 128, 4, 2)
    assert shape.weight_bytes == folder.weight_bytes
    assert shape.block_parameters == 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    assert shape.head_bytes == shape.head_parameters * 4


@pytest.mark.parametrize("lora", [{"rank": 4}, {"rank": 3, "num_layers": 1}, {"rank": 2, "keys": ["mlp.down_proj"]}])
@pytest.mark.parametrize("dora", [False, True])
def test_the_size_of_an_adapter_is_exact(tiny_student: Path, lora: dict[str, Any], dora: bool) -> None:
    settings = LoraConfig(**lora, dora=dora)
    student = Student.load(tiny_student, None, settings, seed=0)
    actual = sum(tensor.size for tensor in student.parameters().values())
    assert adapter_parameters(read_folder(tiny_student), settings) == actual


def test_a_stored_adapter_counts_once_whatever_else_its_folder_holds(tiny_student: Path, tmp_path: Path) -> None:
    student = written(tiny_student, tmp_path)
    actual = sum(tensor.size for tensor in student.parameters().values())
    shutil.copy(tmp_path / WEIGHTS, tmp_path / OPTIMIZER)
    assert (tmp_path / PEFT_WEIGHTS).is_file()
    assert stored_parameters(tmp_path) == actual
    assert stored_parameters(only_peft(tmp_path)) == actual


def test_quantised_models_count_as_what_they_stand_for(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 640, "inner": 1280, "heads": 10, "kv_heads": 2, "vocab": 1000}
    plain = read_folder(write_sparse_model(tmp_path / "plain", **sizes))
    small = read_folder(write_sparse_model(tmp_path / "small", **sizes, bits=4))
    assert shape_of(small).block_parameters == shape_of(plain).block_parameters
    assert shape_of(small).weight_bytes == pytest.approx(shape_of(plain).weight_bytes * 4.5 / 16, rel=0.02)
    assert adapter_parameters(small, LoraConfig()) == adapter_parameters(plain, LoraConfig())
    assert shape_of(in_float32(plain)).weight_bytes == 2 * shape_of(plain).weight_bytes


# Workload


def work(config: dict[str, Any], regime: Regime, lengths: Lengths) -> list[tuple[str, str, Any, float]]:
    values = {"base_model_path": "s", "teacher_model_path": "t", "prompts_path": "p", **config}
    done = workload_of(parse_config(values), regime, lengths)
    return [(task.phase, task.kind, task.item, task.count) for task in done.tasks]


LENGTHS = Lengths(
    train=(20,) * 30,
    completions=(12,) * 30,
    held_out=(20,) * 8,
    teacher_train=(20,) * 30,
    teacher_held_out=(20,) * 8,
    train_count=30,
)
SIZES = {"num_steps": 10, "batch_size": 2, "gradient_accumulation_steps": 3, "max_generation_tokens": 40}


def test_an_on_policy_step_samples_scores_and_learns() -> None:
    done = work(SIZES, Regime(1.0, writes=False, scores=True), LENGTHS)
    assert ("rollout", "sample", Decode(6, 20, 40, 6), 10) in done
    assert ("score", "score", Forward(6, 60, 240), 10) in done
    learned = [(item, count) for phase, kind, item, count in done if kind == "learn"]
    assert sum(count for _, count in learned) == pytest.approx(30)
    assert {item for item, _ in learned} == {Forward(2, 64, 80)}


def test_what_all_prompts_begin_with_is_computed_once_where_that_pays() -> None:
    regime = Regime(1.0, writes=False, scores=True)
    template = replace(LENGTHS, shared=15, held_out_shared=3)
    done = work(SIZES, regime, template)
    assert ("score", "score", Forward(6, 60 - 15 * 5 / 6, 240), 10) in done
    assert ("evaluate", "score", Forward(2, 60, 80), 4) in done  # 3 tokens less wouldn't pay
    assert ("score", "score", Forward(6, 60, 240), 10) in work(SIZES, regime, replace(template, shared=8))


def test_how_much_all_prompts_share_is_counted_in_the_teachers_tokens(tiny_student: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Tell me about {name}"}) + "\n" for name in "abcdefgh"))
    values = {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_student),
        "prompts_path": str(rows),
        "teacher_system_prompt": "You know everything.",
    }
    lengths = measure_lengths(parse_config(values))
    plain = measure_lengths(parse_config({**values, "teacher_system_prompt": ""}))
    assert 0 < plain.shared < lengths.shared < min(lengths.teacher_train)
    assert lengths.held_out_shared > 0


def test_samples_of_one_prompt_are_prefilled_once_and_prefixes_are_shorter() -> None:
    regime = Regime(1.0, writes=False, scores=True, samples_per_prompt=3, prefix_tokens=10)
    done = work(SIZES, regime, LENGTHS)
    assert ("rollout", "sample", Decode(6, 20, 10, 2), 10) in done
    (scored,) = [(item, count) for phase, _, item, count in done if phase == "score"]
    assert scored == (Forward(6, pytest.approx(10 + 20 / 3), 60), 10)


def test_with_staleness_two_steps_are_sampled_together() -> None:
    regime = Regime(1.0, writes=False, scores=True, staleness=1)
    assert ("rollout", "sample", Decode(12, 20, 40, 12), 5) in work(SIZES, regime, LENGTHS)


def test_what_the_student_does_not_say_is_written_and_scored_once() -> None:
    done = work(SIZES, Regime(0.0, writes=True, scores=True), LENGTHS)
    assert ("rollout", "write", Decode(30, 20, 40, 30), 1) in done
    assert ("score", "score", Forward(6, 60, 240), 5) in done
    uncached = work({**SIZES, "use_cache": False}, Regime(0.0, writes=True, scores=True), LENGTHS)
    assert ("score", "score", Forward(6, 60, 240), 10) in uncached


def test_the_teacher_works_on_what_it_reads_itself() -> None:
    lengths = replace(LENGTHS, teacher_train=(120,) * 30, teacher_held_out=(220,) * 8)
    done = work({**SIZES, "max_eval_samples": 4}, Regime(0.5, writes=True, scores=True), lengths)
    assert {item.prompt for _, kind, item, _ in done if kind == "sample"} == {20}
    written = {(phase, item.prompt) for phase, kind, item, _ in done if kind == "write"}
    assert written == {("rollout", 120), ("evaluate", 220)}
    scored = {(phase, item.length) for phase, kind, item, _ in done if kind == "score"}
    assert scored == {("score", 160), ("evaluate", 260)}
    # 20 + 40 tokens, and 20 + 12 where the student is checked.
    assert {item.length for _, kind, item, _ in done if kind in {"learn", "compare"}} == {64, 32}


def test_given_completions_are_as_long_as_they_are() -> None:
    done = work(SIZES, Regime(0.0, writes=False, scores=True), LENGTHS)
    assert not [kind for phase, kind, *_ in done if phase == "rollout"]
    assert ("score", "score", Forward(6, 32, 72), 5) in done


def test_a_trainer_without_a_teacher_scores_nothing() -> None:
    done = work(SIZES, Regime(0.0, writes=False, scores=False), LENGTHS)
    assert not [kind for phase, kind, *_ in done if phase == "score"]


def test_micro_batches_keep_to_the_token_budget() -> None:
    done = work({**SIZES, "batch_size": 6, "max_batch_tokens": 200}, Regime(1.0, writes=False, scores=True), LENGTHS)
    learned = [item for _, kind, item, _ in done if kind == "learn"]
    assert max(item.tokens for item in learned) <= 200
    assert sum(item.sequences for item in learned) == pytest.approx(16 * 18)


def test_the_largest_micro_batch_keeps_to_the_token_budget_too() -> None:
    regime, sizes = Regime(1.0, writes=False, scores=True), {**SIZES, "batch_size": 6}

    def largest(**changes: Any) -> Forward:
        values = {"base_model_path": "s", "teacher_model_path": "t", "prompts_path": "p", **sizes, **changes}
        return workload_of(parse_config(values), regime, LENGTHS).largest

    assert largest().sequences == 6
    assert largest(max_batch_tokens=200).tokens <= 200 < largest().tokens


def test_evaluations_are_counted() -> None:
    regime = Regime(1.0, writes=False, scores=True)

    def compared(**changes: Any) -> float:
        done = work({**SIZES, "max_eval_samples": 0, **changes}, regime, LENGTHS)
        return sum(count * item.sequences for _, kind, item, count in done if kind == "compare")

    assert compared(eval_every=100) == CHECKED + 2 * 8
    assert compared(eval_every=5) == CHECKED + 3 * 8
    assert compared(eval_every=5, max_eval_samples=4) == CHECKED + 3 * (8 + 4)
    assert compared(eval_every=5, max_eval_samples=4, precompute=True) == CHECKED + 3 * 8


@pytest.mark.parametrize(
    ("info", "regime"),
    [
        (ON_POLICY, Regime(1.0, writes=False, scores=True)),
        (OFFLINE, Regime(0.0, writes=True, scores=True)),
        (DATASET, Regime(0.0, writes=False, scores=True)),
        (SFT, Regime(0.0, writes=False, scores=False)),
        (trainer("mixed", student=0.25, teacher=0.75), Regime(0.25, writes=True, scores=True)),
    ],
)
def test_the_regime_follows_from_the_trainer(settings: dict[str, Any], info: TrainerInfo, regime: Regime) -> None:
    assert Regime.of(parse_config(settings), info) == regime
    assert Regime.of(parse_config({**settings, "kl_weight": 0}), info) == regime


def test_prompts_are_measured_with_the_models_own_template(settings: dict[str, Any]) -> None:
    lengths = facts(settings).lengths
    student = Student.load(Path(settings["base_model_path"]), None, LoraConfig(), seed=0)
    message = [{"role": "user", "content": "question 7"}]
    ids = student.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert len(ids) in lengths.train
    assert lengths.train_count + len(lengths.held_out) == 40


def test_prompts_are_measured_as_each_model_reads_them(settings: dict[str, Any]) -> None:
    plain, told = facts(settings), facts(settings, teacher_system_prompt="You know every answer. " * 10)
    assert plain.lengths.teacher_train == plain.lengths.train
    assert told.lengths.train == plain.lengths.train
    assert told.lengths.teacher_longest > told.lengths.longest + 50
    assert told.work.context == plain.work.context == plain.work.teacher_context
    assert told.work.teacher_context > told.work.context
    before, after = plan(plain), plan(told)
    assert dict(after.phases)["score"] > dict(before.phases)["score"]
    assert after.daemon_peak_bytes > before.daemon_peak_bytes
    assert after.worker_peak_bytes == before.worker_peak_bytes


# Plans


def test_a_plan_adds_up(settings: dict[str, Any]) -> None:
    found = plan(facts(settings))
    assert [name for name, _ in found.phases] == [
        "load",
        "rollout",
        "score",
        "train",
        "evaluate",
        "checkpoint",
        "report",
    ]
    assert found.seconds == pytest.approx(sum(seconds for _, seconds in found.phases))
    assert found.disk_bytes == sum(part.bytes for part in found.disk)
    assert found.fits
    assert not found.warnings
    assert not found.calibrated
    for process, peak in (("daemon", found.daemon_peak_bytes), ("worker", found.worker_peak_bytes)):
        inside = parts(found, process)
        assert inside["process"] < peak <= sum(inside.values())


def test_a_plan_grows_with_the_work(settings: dict[str, Any]) -> None:
    short, long = (plan(facts(settings, num_steps=steps)) for steps in (10, 1000))
    phases = dict(short.phases)
    assert dict(long.phases)["rollout"] == pytest.approx(100 * phases["rollout"])
    assert long.disk_bytes > short.disk_bytes
    assert long.peak_bytes == short.peak_bytes


def test_what_is_not_done_takes_nothing(settings: dict[str, Any]) -> None:
    found = plan(facts(settings, SFT))
    assert {"rollout", "score"}.isdisjoint(dict(found.phases))
    assert "teacher targets" in parts(plan(facts(settings)), "worker")
    assert "teacher targets" not in parts(found, "worker")
    assert found.disk_bytes < plan(facts(settings, DATASET)).disk_bytes


def test_a_loaded_teacher_takes_no_loading(settings: dict[str, Any]) -> None:
    run = facts(settings)
    cold, warm = plan(run), plan(replace(run, loaded=True))
    assert dict(warm.phases)["load"] < dict(cold.phases)["load"]
    assert warm.peak_bytes == cold.peak_bytes


# The run people ask about first: 32B teaches 7B on a Mac with 64 GB


@pytest.fixture
def mac(tmp_path: Path, rows: Path) -> dict[str, Any]:
    big = {"layers": 64, "hidden": 5120, "inner": 27_648, "heads": 40, "kv_heads": 8}
    small = {"layers": 28, "hidden": 3584, "inner": 18_944, "heads": 28, "kv_heads": 4}
    words = " ".join(["number"] * 50)
    rows.write_text("".join(json.dumps({"prompt": f"{words} {i}"}) + "\n" for i in range(250)))
    return {
        "teacher_model_path": str(write_sparse_model(tmp_path / "32b", **big, bits=4)),
        "base_model_path": str(write_sparse_model(tmp_path / "7b", **small, bits=4)),
        "prompts_path": str(rows),
        "num_steps": 250,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_generation_tokens": 512,
        "eval_every": 10_000,
        "max_validation_prompts": 2,
        "max_eval_samples": 0,
    }


def planned(settings: dict[str, Any], machine: str, info: TrainerInfo = ON_POLICY, **changes: Any) -> Plan:
    config = parse_config({**settings, **changes})
    return plan(RunFacts.read(config, info, named_machine(machine), loaded=False))


def test_32b_teaches_7b_in_less_than_48_gb(mac: dict[str, Any]) -> None:
    found = planned(mac, "M4 Max 64 GB")
    assert found.machine == "M4 Max 64 GB"
    assert found.fits
    assert 25 * GB < found.peak_bytes < 48 * GB
    daemon, worker = parts(found, "daemon"), parts(found, "worker")
    assert daemon["teacher weights"] == pytest.approx(18.43 * GB, rel=0.01)
    assert worker["student weights"] == pytest.approx(4.28 * GB, rel=0.01)
    # Rank 16 on every linear layer is 40.4 million weights, 161 MB in float32: more than the 100 MB once promised.
    checkpoints = {part.name: part.bytes for part in found.disk}["checkpoints"]
    assert checkpoints == pytest.approx(11 * 161.5e6, rel=0.01)


def test_32b_teaches_7b_in_some_hours(mac: dict[str, Any]) -> None:
    hours = {name: planned(mac, f"{name} 64 GB").seconds / 3600 for name in ("M3 Max", "M4 Max", "M5 Max", "M4 Pro")}
    # From measured rates of these chips, for 2000 sequences of 150 + 512 tokens: 4.8, 3.8, 1.8 and 7.7 hours.
    assert hours["M3 Max"] == pytest.approx(4.8, rel=0.25)
    assert hours["M4 Max"] == pytest.approx(3.8, rel=0.25)
    assert hours["M5 Max"] == pytest.approx(1.8, rel=0.25)
    assert hours["M4 Pro"] == pytest.approx(7.7, rel=0.25)


def test_a_run_that_does_not_fit_is_told_what_to_change(mac: dict[str, Any], tmp_path: Path) -> None:
    small = {"layers": 28, "hidden": 3584, "inner": 18_944, "heads": 28, "kv_heads": 4}
    mac["base_model_path"] = str(write_sparse_model(tmp_path / "7b-bf16", **small))
    found = planned(mac, "M4 Max 48 GB", backward="plain", batch_size=8, gradient_accumulation_steps=1)
    assert not found.fits
    assert "it will not fit" in found.warnings[0]
    advised = " | ".join(found.advice)
    assert "student quantised to 4 bits" in advised
    assert "backward layerwise" in advised
    assert "batch_size 1 with gradient_accumulation_steps 8" in advised
    assert "instead of" in found.advice[0]


def test_precompute_counts_the_larger_process_alone(mac: dict[str, Any]) -> None:
    both = planned(mac, "M4 Max 36 GB", OFFLINE)
    alone = planned(mac, "M4 Max 36 GB", OFFLINE, precompute=True)
    assert alone.peak_bytes < both.peak_bytes - 4 * GB
    assert any("precompute true" in line for line in both.advice)


def test_pressure_is_warned_of_before_it_is_too_much(settings: dict[str, Any]) -> None:
    run = facts(settings)
    needed = sum(run.peaks)
    tight = plan(replace(run, machine=replace(run.machine, usable_bytes=int(needed / 0.9))))
    assert tight.fits
    assert "close other programs" in tight.warnings[0]
    roomy = plan(replace(run, machine=replace(run.machine, usable_bytes=2 * needed)))
    assert not roomy.warnings


def test_a_worker_that_needs_more_than_its_limit_does_not_fit(settings: dict[str, Any]) -> None:
    needed = facts(settings).worker_peak
    assert plan(facts(settings, worker_memory_limit_bytes=needed)).fits
    found = plan(facts(settings, worker_memory_limit_bytes=needed // 2))
    assert not found.fits
    assert "worker_memory_limit_bytes allows" in found.warnings[0]
    assert "it will not fit" in found.warnings[0]


def test_a_run_that_takes_more_disk_than_is_free_does_not_fit(settings: dict[str, Any]) -> None:
    run = facts(settings)
    needed = plan(run).disk_bytes
    (cached,) = [part.bytes for part in plan(run).disk if part.name == "teacher cache"]

    def on(free: int, *cache: int) -> Plan:
        return plan(replace(run, disk=DiskSpace(free, *cache)))

    assert on(needed, 0, 2 * cached).fits
    found = on(needed - 1, 0, 2 * cached)
    assert not found.fits
    assert "on disk" in found.warnings[0]
    assert "it will not fit" in found.warnings[0]
    # A full cache takes no more of the disk.
    assert on(needed - cached, 2 * cached, 2 * cached).fits
    assert not on(needed - cached - 1, 2 * cached, 2 * cached).fits


def test_computing_ahead_needs_a_cache_that_holds_it_all(settings: dict[str, Any]) -> None:
    ahead, late = facts(settings, OFFLINE, precompute=True), facts(settings, OFFLINE)
    (cached,) = [part.bytes for part in plan(ahead).disk if part.name == "teacher cache"]
    assert plan(replace(ahead, disk=DiskSpace(1 << 40, 0, cached))).fits
    small = DiskSpace(1 << 40, 0, cached - 1)
    found = plan(replace(ahead, disk=small))
    assert not found.fits
    assert "opd serve --cache-limit" in found.warnings[0]
    assert plan(replace(late, disk=small)).fits


# Machines


@pytest.mark.parametrize("name", ["M4 Max 64 GB", "m4 max 64gb", "Apple M4 Max 64", *machine_names()])
def test_machines_are_known_by_name(name: str) -> None:
    machine = named_machine(name)
    assert machine.name in machine_names()
    assert machine.usable_bytes == 0.75 * machine.total_bytes


@pytest.mark.parametrize("name", ["M4 Max", "M4 Max 63 GB", "Cray-1 8 GB", ""])
def test_an_unknown_machine_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(OpdError) as caught:
        named_machine(name)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.violations[0].field == "machine"
    assert "M4 Max 64 GB" in caught.value.violations[0].description


def test_this_machine_has_the_memory_that_is_free_or_ours() -> None:
    machine: Machine = this_machine()
    assert 0 < machine.usable_bytes <= machine.total_bytes * 1.1


def test_what_a_run_beside_holds_is_not_free() -> None:
    held = 600 << 20
    command = [sys.executable, "-c", f"held = b'x' * {held}; print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        after_it, beside_it = this_machine().usable_bytes, this_machine(beside=1).usable_bytes
        other.communicate(b"\n")
    assert after_it - beside_it > held / 2
