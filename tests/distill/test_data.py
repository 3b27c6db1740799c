"""Rows, faults with file and line, tokenising, splits and epochs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill.data import PromptSet, build_prompts, read_rows, split_rows
from opd_daemon.errors import OpdError, Reason


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def config(path: Path, **changes: Any) -> RunConfig:
    return parse_config({"base_model_path": "b", "teacher_model_path": "t", "prompts_path": str(path), **changes})


@pytest.mark.parametrize(
    ("line", "prompt", "completion"),
    [
        ('{"prompt": "Hi"}', "Hi", None),
        ('{"prompt": "Hi", "completion": "Hello"}', "Hi", "Hello"),
        ('{"prompt": "Hi", "completion": null, "id": 3}', "Hi", None),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "Hi", None),
        ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}', "Hi", "Yo"),
        ('{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}', "Hi", None),
        ('{"text": "Once upon a time"}', "Once upon a time", None),
    ],
)
def test_every_form_of_row_is_read(tmp_path: Path, line: str, prompt: str, completion: str | None) -> None:
    (row,) = read_rows(write(tmp_path / "a.jsonl", line.encode()))
    assert (row.prompt, row.completion) == (prompt, completion)


def test_bom_windows_lines_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    content = '\ufeff{"prompt": "one"}\r\n\r\n   \n{"prompt": "zwei ü \u2028"}'.encode()
    rows = read_rows(write(tmp_path / "a.jsonl", content))
    assert [row.place.rpartition(":")[2] for row in rows] == ["1", "4"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a', "not JSON: "),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 0xff at column 13)"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"question": "a", "answer": "b"}', 'has "question", "answer"; give {"prompt"}'),
        (b"{}", "has no keys"),
        (b'{"prompt": 3}', '"prompt" is 3, not a text'),
        (b'{"prompt": "  "}', '"prompt" is empty'),
        (b'{"prompt": "a", "completion": ""}', '"completion" is empty'),
        (b'{"messages": []}', '"messages" is not a list of messages'),
        (b'{"messages": [{"content": "a"}]}', 'message 1 of "messages" has no "role"'),
        (b'{"messages": [{"role": "user", "content": null}]}', '"content" of message 1 is null, not a text'),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', 'no message of role "user"'),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "a.jsonl:2"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(OpdError) as caught:
        read_rows(path)
    assert caught.value.reason == Reason.INVALID_RUN_CONFIG
    assert f"{path}:2: " in caught.value.message
    assert says in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_an_empty_file_says_what_belongs_in_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(OpdError, match="holds no rows; give one JSON object a line, "):
        read_rows(write(tmp_path / "a.jsonl", content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=r"nowhere\.jsonl: no such file"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert len(read_rows(path, 2)) == 2


def rows_file(path: Path, count: int) -> Path:
    return write(path, "".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(count)).encode())


def test_one_file_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 20)
    train, held_out = split_rows(config(path, validation_fraction=0.2))
    assert (len(train), len(held_out)) == (16, 4)
    assert {row.prompt for row in train} | {row.prompt for row in held_out} == {f"question {i}" for i in range(20)}
    assert split_rows(config(path, validation_fraction=0.2)) == (train, held_out)
    assert split_rows(config(path, validation_fraction=0.2, seed=1)) != (train, held_out)


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="1 row can't be split"):
        split_rows(config(rows_file(tmp_path / "a.jsonl", 1)))


def test_limits_apply_to_both_files(tmp_path: Path) -> None:
    first, second = rows_file(tmp_path / "a.jsonl", 9), rows_file(tmp_path / "b.jsonl", 9)
    split = config(first, validation_prompts_path=str(second), max_prompts=5, max_validation_prompts=3)
    assert [len(rows) for rows in split_rows(split)] == [5, 3]


def prompts(count: int, seed: int = 0) -> PromptSet:
    return PromptSet(tuple(range(count)), (), seed)  # type: ignore[arg-type]


def test_every_epoch_uses_every_prompt_once_in_an_order_of_its_own() -> None:
    order = prompts(7).take(0, 21)
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert prompts(7, seed=1).take(0, 7) != epochs[0]


def test_a_cursor_goes_on_where_it_stood() -> None:
    whole = prompts(5).take(0, 30)
    assert [*prompts(5).take(0, 13), *prompts(5).take(13, 17)] == whole


def test_reference_is_the_answer_up_to_its_first_eos(tmp_path: Path, tiny_student: Path) -> None:
    tokenizer = load_tokenizer(tiny_student)
    eos = tokenizer.eos_token_id
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    lines = [chat, {"prompt": "Why?"}, {"text": "The tide comes in twice a day"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    other = rows_file(tmp_path / "held_out.jsonl", 1)
    both = config(path, validation_prompts_path=str(other))
    first, second, third = build_prompts(both, tokenizer, [eos], 4096).train
    assert tokenizer.decode(first.token_ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.reference_ids) == "Because.<|im_end|>"
    assert second.token_ids == first.token_ids
    assert second.reference_ids is None
    assert third.reference_ids is not None
    assert tokenizer.decode([*third.token_ids, *third.reference_ids[:-1]]) == "The tide comes in twice a day"


def test_what_is_held_out_is_never_trained_on(tmp_path: Path, tiny_student: Path) -> None:
    path, held_out = rows_file(tmp_path / "a.jsonl", 6), rows_file(tmp_path / "b.jsonl", 2)
    prompts = build_prompts(
        config(path, validation_prompts_path=str(held_out)), load_tokenizer(tiny_student), [0], 4096
    )
    assert [prompt.text for prompt in prompts.train] == [f"question {i}" for i in range(2, 6)]
    assert prompts.left_out == 2
    with pytest.raises(OpdError, match=r"b\.jsonl: every training prompt is held out too"):
        build_prompts(config(held_out, validation_prompts_path=str(path)), load_tokenizer(tiny_student), [0], 4096)


def teacher_reads(tmp_path: Path, tiny_student: Path, line: dict[str, Any], **changes: Any) -> str:
    path = write(tmp_path / "a.jsonl", json.dumps(line).encode())
    other = rows_file(tmp_path / "held_out.jsonl", 1)
    tokenizer = load_tokenizer(tiny_student)
    asked = {"teacher_tokenizer": changes.pop("teacher_tokenizer", None)}
    settings = config(path, validation_prompts_path=str(other), **changes)
    (prompt,) = build_prompts(settings, tokenizer, [0], 4096, **asked).train
    assert tokenizer.decode(prompt.token_ids).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    return str(tokenizer.decode(prompt.teacher_token_ids))


def test_a_row_may_ask_the_teacher_something_else(tmp_path: Path, tiny_student: Path) -> None:
    hint = {"prompt": "Hi", "teacher_prompt": "Hi. The answer is 42."}
    assert "user\nHi. The answer is 42.<|im_end|>" in teacher_reads(tmp_path, tiny_student, hint)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = {"messages": chat, "teacher_prompt": "Hey"}
    read = teacher_reads(tmp_path, tiny_student, row)
    assert read.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHey<|im_end|>")
    row = {"prompt": "Hi", "teacher_messages": chat}
    assert teacher_reads(tmp_path, tiny_student, row).startswith("<|im_start|>system\nBe brief.")


def test_the_teacher_may_have_a_system_prompt_of_its_own(tmp_path: Path, tiny_student: Path) -> None:
    read = teacher_reads(tmp_path, tiny_student, {"prompt": "Hi"}, teacher_system_prompt="You know all.")
    assert read.startswith("<|im_start|>system\nYou know all.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    read = teacher_reads(tmp_path, tiny_student, {"messages": chat}, teacher_system_prompt="You know all.")
    assert read.startswith("<|im_start|>system\nYou know all.\n\nBe brief.<|im_end|>")


def test_the_teacher_may_read_its_own_template(tmp_path: Path, tiny_student: Path) -> None:
    own = load_tokenizer(tiny_student)
    own.chat_template = "{% for message in messages %}Q: {{ message.content }}\nA:{% endfor %}"
    read = teacher_reads(tmp_path, tiny_student, {"prompt": "Hi"}, teacher_tokenizer=own)
    assert read == "Q: Hi\nA:"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"text": "once", "teacher_prompt": "x"}, "a plain text is the same for both models"),
        ({"prompt": "a", "teacher_prompt": " "}, '"teacher_prompt" is empty'),
        ({"prompt": "a", "teacher_messages": []}, '"teacher_messages" is not a list of messages'),
        (
            {
                "prompt": "a",
                "teacher_messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            },
            '"teacher_messages" ends with an answer',
        ),
    ],
)
def test_faulty_words_for_the_teacher_are_named(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    with pytest.raises(OpdError, match=r"a\.jsonl:1: ") as caught:
        read_rows(write(tmp_path / "a.jsonl", json.dumps(line).encode()))
    assert says in caught.value.message


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path, tiny_student: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2)
    tokenizer = load_tokenizer(tiny_student)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(OpdError, match=r"a\.jsonl:\d: the chat template refuses it: no user here"):
        build_prompts(config(path), tokenizer, [0], 4096)


@pytest.mark.parametrize(
    ("changes", "context", "says"),
    [({"max_prompt_tokens": 3}, 512, "more than max_prompt_tokens 3"), ({}, 100, "more than the context of 100")],
)
def test_prompts_that_do_not_fit_are_named(
    tmp_path: Path, tiny_student: Path, changes: dict[str, Any], context: int, says: str
) -> None:
    path = rows_file(tmp_path / "a.jsonl", 3)
    with pytest.raises(OpdError, match=says) as caught:
        build_prompts(config(path, **changes), load_tokenizer(tiny_student), [0], context)
    assert f"{path}:" in caught.value.message


def test_reading_rows_and_checking_runs_loads_no_mlx() -> None:
    code = (
        "import sys, opd_daemon.distill.preflight, opd_daemon.distill.checkpoints; "
        "sys.exit(any(name in sys.modules for name in ('mlx.core', 'mlx_lm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
