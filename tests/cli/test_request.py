"""Configuration from file, preset and settings, and where a faulty value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_daemon.cli.request import read_request
from opd_daemon.errors import OpdError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base_model_path: models/student\n"
        "teacher_model_path: /models/teacher\n"
        "prompts_path: ~/prompts.jsonl\n"
        "learning_rate: 1e-4\n"
        "lora:\n"
        "  rank: 8\n"
    )
    return file


def faults(file: Path, *settings: str, preset: str = "") -> list[str]:
    with pytest.raises(OpdError) as found:
        read_request(file, preset, settings).config()
    return [f"{entry.field}: {entry.description}" for entry in found.value.violations]


def test_paths_in_the_file_are_relative_to_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = read_request(file, "", []).config()
    assert config.base_model_path == str(file.parent / "models/student")
    assert config.teacher_model_path == "/models/teacher"
    assert config.prompts_path == "/home/someone/prompts.jsonl"


def test_paths_in_settings_are_relative_to_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read_request(file, "", ["base_model_path=../other"]).config()
    assert config.base_model_path == str(tmp_path / "other")


def test_settings_win_over_the_file_and_the_file_over_the_preset(file: Path) -> None:
    file.write_text(file.read_text() + "num_steps: 7\n")
    config = read_request(file, "fast", ["lora.rank=4", "max-prompts=9"]).config()
    assert (config.num_steps, config.batch_size, config.max_prompts, config.lora.rank) == (7, 1, 9, 4)
    assert config.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("seed=3", "seed", 3),
        ("learning_rate=3e-4", "learning_rate", 3e-4),
        ("use_cache=false", "use_cache", False),
        ("trainer=offline", "trainer", "offline"),
        ("session_id=", "session_id", ""),
        ("trainer_options.alpha=0.5", "trainer_options", {"alpha": 0.5}),
    ],
)
def test_settings_are_yaml_values(file: Path, setting: str, name: str, value: object) -> None:
    assert getattr(read_request(file, "", [setting]).config(), name) == value


def test_every_fault_names_its_place_value_and_rule(file: Path) -> None:
    file.write_text(file.read_text() + "batch_size: 0\nnum_stepz: 3\n")
    found = faults(file, "temperature=.nan", "lora.rnk=4", "max_prompts=many")
    assert len(found) == 5
    assert f"{file}:7: batch_size: 0: input should be greater than or equal to 1" in found
    assert f"{file}:8: num_stepz: no such field; did you mean num_steps?" in found
    assert any(line.startswith("--set temperature=.nan: nan: ") for line in found)
    assert "--set lora.rnk=4: no such field; did you mean rank?" in found
    assert any(line.startswith("--set max_prompts=many: 'many': ") for line in found)


def test_a_missing_field_names_the_file(file: Path) -> None:
    file.write_text("prompts_path: p.jsonl\n")
    found = faults(file)
    assert [line.split(": ")[:2] for line in found] == [
        [str(file), "base_model_path"],
        [str(file), "teacher_model_path"],
    ]


def test_a_faulty_preset_value_is_impossible_but_an_unknown_preset_is_named(file: Path) -> None:
    with pytest.raises(OpdError, match="--preset fats: no such preset; did you mean fast"):
        read_request(file, "fats", [])


@pytest.mark.parametrize(("setting", "why"), [("batch_size", "name=value"), ("=3", "name=value"), ("a=[", "no YAML")])
def test_a_malformed_setting_is_refused(file: Path, setting: str, why: str) -> None:
    with pytest.raises(OpdError, match=why):
        read_request(file, "", [setting])


@pytest.mark.parametrize(
    ("text", "why"), [("- 1\n", "name: value"), ("a: [\n", r"run\.yaml:2"), ("a: b: c\n", r"run\.yaml:1")]
)
def test_a_broken_file_names_file_and_line(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(OpdError, match=why):
        read_request(file, "", [])


@pytest.mark.parametrize(
    ("text", "line", "name"), [("seed: 1\nseed: 2\n", 2, "seed"), ("lora:\n  rank: 1\n  rank: 2\n", 3, "rank")]
)
def test_a_name_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int, name: str) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(OpdError, match=rf"twice\.yaml:{line}: '{name}' is given twice"):
        read_request(file, "", [])


@pytest.mark.parametrize("setting", ["eval_every=true", "learning_rate=false", "lora.rank=true"])
def test_true_and_false_are_no_numbers(file: Path, setting: str) -> None:
    (fault,) = faults(file, setting)
    assert "true and false are no value" in fault
    assert read_request(file, "", ["use_cache=false"]).config().use_cache is False
