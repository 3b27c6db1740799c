"""Models, rows and other files that are no good: each is named with its cure, and the daemon serves on."""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

import gzip
import os

import pytest

from tests.bad_inputs.stage import CONFIG, NO_MODEL, OK_ROWS, REQUEST, Fault, Stage, check, refusal

FAULTS: dict[str, Fault] = {
    # Models
    "no folder": Fault(24, lambda s: s.check(base_model_path=f"{s.folder}/nope"), CONFIG, "config.base_model_path", "/nope: no such folder; give"),
    "no teacher": Fault(24, lambda s: s.check(teacher_model_path=f"{s.folder}/nope"), CONFIG, "config.teacher_model_path", "no such folder; give"),
    "no model": Fault(24, lambda s: s.check(base_model_path=f"{s.folder}/no_model"), CONFIG, "config.base_model_path", "no config.json"),
    "unknown ~user": Fault(24, lambda s: s.check(base_model_path="~no_such_user/x"), CONFIG, "config.base_model_path", "no such folder"),
    "long name": Fault(23, lambda s: s.check(base_model_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.base_model_path", "no such folder"),
    "long name of rows": Fault(23, lambda s: s.check(prompts_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.prompts_path", "can't be read"),
    "long name of an adapter": Fault(23, lambda s: s.check(student_adapter_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.student_adapter_path", "adapter_config.json"),
    "control character": Fault(23, lambda s: s.check(prompts_path="/a\0b"), CONFIG, "config.prompts_path", "control character"),
    "broken config": Fault(24, lambda s: s.check_model("m1", "config.json", "{"), CONFIG, "config.base_model_path", "not valid JSON"),
    "deep config": Fault(24, lambda s: s.check_model("m2", "config.json", 99_999 * "["), CONFIG, "config.base_model_path", "not valid JSON"),
    "broken tokenizer": Fault(24, lambda s: s.check_model("m3", "tokenizer.json", '{"model": {"vocab": "x"}}'), CONFIG, "config.base_model_path", "tokenizer.json is broken"),
    "no adapter": Fault(24, lambda s: s.check(student_adapter_path=f"{s.folder}/no_model"), CONFIG, "config.student_adapter_path", "adapter_config.json: no such file"),
    "other tokenizer": Fault(32, lambda s: s.check(teacher_model_path=f"{s.folder}/shuffled"), CONFIG, "config.teacher_model_path", "id 0 is 'Ď' / '!'"),
    "load nothing": Fault(3, lambda s: list(s.client.load_teacher("")), REQUEST, "model_path", "name a model folder"),
    "load no folder": Fault(24, lambda s: list(s.client.load_teacher(f"{s.folder}/nope")), NO_MODEL, "", "/nope'; give a folder"),
    "load no model": Fault(24, lambda s: list(s.client.load_teacher(f"{s.folder}/no_model")), NO_MODEL, "", "no config.json; give"),
    "load long name": Fault(23, lambda s: list(s.client.load_teacher(f"{s.folder}/" + 300 * "n")), NO_MODEL, "", "give a folder"),
    # Rows
    "broken line": Fault(25, lambda s: s.check_rows(b'{"prompt": "a"}\n{"prompt": "b"\n'), CONFIG, "config.prompts_path", "faulty.jsonl:2: not JSON"),
    "no rows": Fault(25, lambda s: s.check_rows(b""), CONFIG, "config.prompts_path", "holds no rows; give"),
    "wrong keys": Fault(25, lambda s: s.check_rows(OK_ROWS + b'{"question": "a"}\n'), CONFIG, "config.prompts_path", 'faulty.jsonl:25: has "question"; give {"prompt"}'),
    "not UTF-8": Fault(25, lambda s: s.check_rows(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n'), CONFIG, "config.prompts_path", "faulty.jsonl:2: not UTF-8"),
    "endless number": Fault(25, lambda s: s.check_rows(OK_ROWS + b'{"prompt": ' + 5000 * b"1" + b"}\n"), CONFIG, "config.prompts_path", "faulty.jsonl:25: not a row"),
    "folder of rows": Fault(24, lambda s: s.check(prompts_path=str(s.folder)), CONFIG, "config.prompts_path", "can't be read"),
    "device": Fault(24, lambda s: s.check(prompts_path="/dev/zero"), CONFIG, "config.prompts_path", "outside the folders"),
    "pipe": Fault(24, lambda s: s.check(prompts_path=str(s.pipe())), CONFIG, "config.prompts_path", "a device, pipe or socket"),
    "line without an end": Fault(25, lambda s: s.check_rows(OK_ROWS + (17 << 20) * b" "), CONFIG, "config.prompts_path", "faulty.jsonl:25: longer than"),
    "cut gzip": Fault(25, lambda s: s.check_rows(gzip.compress(OK_ROWS)[:60]), CONFIG, "config.prompts_path", "not UTF-8"),
    "one row": Fault(25, lambda s: s.check_rows(b'{"prompt": "a"}\n'), CONFIG, "config.prompts_path", "add rows"),
    "no file": Fault(24, lambda s: s.check(prompts_path=f"{s.folder}/nope.jsonl"), CONFIG, "config.prompts_path", "/nope.jsonl: no such file"),
    "no prompts": Fault(3, lambda s: s.check(prompts_path=""), CONFIG, "config.prompts_path", "give a JSONL file"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_the_daemon_serves_on(stage: Stage, name: str) -> None:
    check(stage, FAULTS[name])


@pytest.mark.parametrize(("role", "folder"), [("teacher", "superset"), ("base", "superset"), ("teacher", "padded")])
def test_wider_and_larger_vocabularies_are_no_fault(stage: Stage, role: str, folder: str) -> None:
    stage.check(**{f"{role}_model_path": str(stage.folder / folder)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_output_folder_is_refused(stage: Stage) -> None:
    closed = stage.folder / "closed"
    closed.mkdir(mode=0o500)
    error = refusal(lambda: stage.check(output_adapter_path=str(closed / "out")))
    assert [violation.field for violation in error.violations] == ["config.output_adapter_path"]
    assert "choose another place" in error.violations[0].description


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(stage: Stage) -> None:
    stage.check_rows(b"\xef\xbb\xbf" + OK_ROWS.replace(b"\n", b"\r\n"))
