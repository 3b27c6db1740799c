"""Runs over the wire: one short one from plan to download, and what the catalogue shows afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_daemon.client import Client
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Event, EventKind, RunState


@pytest.fixture
def values(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> dict[str, object]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(8)))
    return {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(prompts),
        "num_steps": 2,
        "max_generation_tokens": 4,
        "lora": {"rank": 2},
    }


def test_validate_only_plans_and_creates_nothing(client: Client, values: dict[str, object]) -> None:
    run, _ = client.create_run(values, validate_only=True)
    assert run.plan is not None
    assert run.plan.peak_bytes > 0
    assert run.run_id not in {known.run_id for known in client.runs()}


def test_faults_come_back_one_by_one_with_their_fields(client: Client, values: dict[str, object]) -> None:
    with pytest.raises(OpdError) as found:
        client.create_run({**values, "batch_size": 0, "base_model_path": "/nowhere"})
    assert found.value.reason is Reason.INVALID_RUN_CONFIG
    assert "config.batch_size" in {violation.field for violation in found.value.violations}


def test_a_run_from_plan_to_adapter(client: Client, values: dict[str, object], tmp_path: Path) -> None:
    run, revision = client.create_run(values, request_id="once")
    assert client.create_run(values, request_id="once")[0].run_id == run.run_id
    states = []
    for item in client.watch(revision, run.run_id):
        if isinstance(item, Event) and item.kind is EventKind.RUN_STATE:
            states.append(item.payload["state"])
            if RunState(states[-1]).resting:
                break
    assert states[0] == "PENDING"
    assert states[-1] == "SUCCEEDED"
    steps, evaluations, best = client.metrics(run.run_id)
    assert [row["step"] for row in steps] == [1, 2]
    assert evaluations[0]["step"] == 0
    assert best is None or best.is_best
    assert [entry.step for entry in client.checkpoints(run.run_id)][-1] == 2
    files = client.download_adapter(run.run_id, tmp_path / "adapter", "final")
    wanted = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors", "README.md"}
    assert {file.name for file in files} == wanted
    final = Path(client.run(run.run_id)[0].adapter_path)
    assert all(file.read_bytes() == (final / file.name).read_bytes() for file in files)
    assert run.run_id in {entry.run_id for entry in client.adapters()}
    client.delete(run.run_id)
    with pytest.raises(OpdError) as found:
        client.run(run.run_id)
    assert found.value.reason is Reason.RUN_NOT_FOUND


def test_the_catalogue_shows_trainers_plugins_and_presets(client: Client) -> None:
    assert {"on_policy", "offline"} <= {entry.name for entry in client.trainers()}
    divergences = {entry.name: entry for entry in client.divergences()}
    assert divergences["reverse_kl"].signals == ("exact", "sparse", "sampled")
    assert divergences["jsd"].options_schema["properties"]["beta"]["default"] == 0.5
    assert {entry.plugin for entry in divergences.values()} == {""}
    assert all(not entry.error for entry in client.plugins())
    presets = {entry.name: entry.values for entry in client.presets()}
    assert presets["fast"]["num_steps"] == 100
    assert isinstance(client.models(), list)
