"""Training rows in JSONL files, the prompts made of them, and the order in which a run uses them.

Nothing heavy is imported here, because the daemon checks a file's rows before it accepts a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.imports import importing
from opd_daemon.paths import open_plain

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig

EXPECTED = '{"prompt"}, or mlx-lm\'s {"messages"}, {"prompt", "completion"} or {"text"}'

# In bytes; no row is as long, but some file that has no lines at all may be.
LONGEST_LINE = 16 << 20

TEACHER_KEYS = ("teacher_prompt", "teacher_messages")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file. place: `file:line`.

    messages: what the student is asked, as chat messages; empty for a plain text, which is in `text`.
    completion: the answer the file gives, None when it gives none.
    teacher_messages: what the teacher is asked in their place; empty where it is asked the same.
    """

    place: str
    messages: tuple[dict[str, str], ...]
    text: str = ""
    completion: str | None = None
    teacher_messages: tuple[dict[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """The last thing said before the answer, for people to read."""
        return self.messages[-1]["content"] if self.messages else self.text


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised row.

    reference_ids: the file's own completion including its EOS, None when it gives none. teacher_ids: what the teacher
    reads in place of token_ids, None where it reads the same.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] | None = None
    place: str = ""
    teacher_ids: tuple[int, ...] | None = None

    @property
    def teacher_token_ids(self) -> tuple[int, ...]:
        """The prompt as the teacher reads it."""
        return self.token_ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Training and held-out prompts. Every epoch has its own order, which depends on the seed alone.

    left_out: training rows that ask what a held-out row asks, and are not trained on for that.
    """

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    seed: int
    left_out: int = 0

    def take(self, cursor: int, count: int) -> list[Prompt]:
        """The `count` prompts after the first `cursor` ones of the run, epochs following each other."""
        size = len(self.train)
        orders: dict[int, list[int]] = {}
        taken = []
        for place in range(cursor, cursor + count):
            epoch, offset = divmod(place, size)
            if epoch not in orders:
                orders[epoch] = _shuffled(size, self.seed, epoch)
            taken.append(self.train[orders[epoch][offset]])
        return taken


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read the first `limit` rows of a JSONL file; blank lines, a byte-order mark and Windows line ends are no fault.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming file and line at the first fault, or the file when it has no rows.
    """
    rows = []
    for entry in scan_rows(path, limit):
        if isinstance(entry, str):
            raise OpdError(Reason.INVALID_RUN_CONFIG, entry, path=path)
        rows.append(entry)
    return rows


def scan_rows(path: Path, limit: int | None = None) -> Iterator[Row | str]:
    """Rows of a JSONL file in order; in place of a faulty row, a line that names file, line and cure."""
    found = 0
    try:
        with open_plain(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if found == limit:
                    return
                if len(line) > LONGEST_LINE:
                    yield f"{path}:{number}: longer than {LONGEST_LINE} bytes; give one row a line"
                    return
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    found += 1
                    yield _parse_line(content, f"{path}:{number}")
    except FileNotFoundError:
        yield f"{path}: no such file"
    except OSError as fault:
        yield f"{path}: can't be read: {fault.strerror}"
    else:
        if not found:
            yield f"{path}: holds no rows; give one JSON object a line, {EXPECTED}"


def split_rows(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a run: from two files, or one file split by the run's seed.

    Raises:
        OpdError: INVALID_RUN_CONFIG for a faulty file, or one with too few rows to split.
    """
    if config.prompts_path and config.validation_prompts_path:
        held_out = read_rows(Path(config.validation_prompts_path), config.max_validation_prompts)
        return read_rows(Path(config.prompts_path), config.max_prompts), held_out
    path = Path(config.prompts_path or config.validation_prompts_path)
    rows = read_rows(path, config.max_prompts + config.max_validation_prompts)
    if len(rows) < 2:
        message = f"{path}: 1 row can't be split into training and held-out rows; add rows or name a second file"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message, path=path)
    wanted = min(max(1, round(len(rows) * config.validation_fraction)), len(rows) - 1, config.max_validation_prompts)
    order = _shuffled(len(rows), config.seed, len(rows))
    held_out_places = set(order[:wanted])
    train = [row for place, row in enumerate(rows) if place not in held_out_places]
    held_out = [row for place, row in enumerate(rows) if place in held_out_places]
    return train[: config.max_prompts], held_out


def _shuffled(size: int, *seed: int) -> list[int]:
    """The numbers below `size` in an order that depends on the seed alone."""
    import numpy as np  # a tenth of a second, and only a run draws

    order: list[int] = np.random.default_rng(seed).permutation(size).tolist()
    return order


def build_prompts(
    config: RunConfig, tokenizer: Any, eos_ids: Sequence[int], max_context: int, teacher_tokenizer: Any = None
) -> PromptSet:
    """Read, split and tokenise the run's rows with the student's tokenizer and chat template.

    teacher_tokenizer: whose template renders what the teacher reads; None is the student's. A training row that asks
    the same as a held-out one is left out.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming file and line, also of a prompt longer than `max_prompt_tokens`, or that
            leaves no room for `max_generation_tokens` in the models' context; or when no training row is left.
    """
    train, held_out = split_rows(config)
    rows = [*train, *held_out]
    reader = TeacherReader(config.teacher_system_prompt, teacher_tokenizer)
    prompts = [tokenise(row, index, tokenizer, eos_ids, reader) for index, row in enumerate(rows)]
    for prompt in prompts:
        if fault := length_fault(prompt, config, max_context, max_context):
            raise OpdError(Reason.INVALID_RUN_CONFIG, fault.description, place=prompt.place)
    asked = {prompt.token_ids for prompt in prompts[len(train) :]}
    unseen = tuple(prompt for prompt in prompts[: len(train)] if prompt.token_ids not in asked)
    if not unseen:
        message = f"{train[0].place.rpartition(':')[0]}: every training prompt is held out too; hold out other rows"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message)
    return PromptSet(unseen, tuple(prompts[len(train) :]), config.seed, len(train) - len(unseen))


def length_fault(prompt: Prompt, config: RunConfig, context: int, teacher_context: int) -> FieldViolation | None:
    """Whether a prompt is too long as either model reads it, or leaves no room to answer in the context it is read in.

    context: of what the student reads; teacher_context: of what the teacher reads.
    """
    given, generated = config.max_prompt_tokens, config.max_generation_tokens
    readings = (
        ("", prompt.token_ids, context),
        (" as the teacher reads it", prompt.teacher_token_ids, teacher_context),
    )
    for reading, ids, room in readings:
        place = f"{prompt.place}: {len(ids)} tokens{reading}"
        if len(ids) > given:
            message = f"{place}, more than max_prompt_tokens {given}; shorten the prompt or raise it"
            return FieldViolation("config.max_prompt_tokens", message)
        if len(ids) + generated > room:
            message = f"{place}, with max_generation_tokens {generated} more than the context of {room}"
            return FieldViolation("config.max_generation_tokens", f"{message}; shorten the prompt or lower it")
    return None


@dataclass(frozen=True, slots=True)
class TeacherReader:
    """How the teacher reads a row: with a system prompt of its own, with its own tokenizer's template, or as it is."""

    system_prompt: str = ""
    tokenizer: Any = None

    def ids(self, row: Row, student_tokenizer: Any) -> tuple[int, ...] | None:
        """The teacher's own prompt; None where it is the student's."""
        if fault := self.fault(row):
            raise OpdError(Reason.INVALID_RUN_CONFIG, fault, place=row.place)
        if not row.messages or (not row.teacher_messages and not self.system_prompt and self.tokenizer is None):
            return None
        return _render(self.tokenizer or student_tokenizer, self.messages(row), row.place)

    def fault(self, row: Row) -> str:
        """Why the teacher can't read a row; empty when it can."""
        if row.messages or not self.system_prompt:
            return ""
        return f"{row.place}: a plain text has no chat to put teacher_system_prompt into; give messages"

    def messages(self, row: Row) -> list[dict[str, str]]:
        """What the teacher is asked, as chat messages."""
        messages = list(row.teacher_messages or row.messages)
        return with_system_prompt(messages, self.system_prompt) if self.system_prompt else messages


def with_system_prompt(messages: Sequence[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The messages with a system prompt in front; one that is there already follows it, as templates take only one."""
    first, rest = messages[0], messages[1:]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{"role": "system", "content": f"{text}\n\n{first['content']}"}, *rest]


SAME_AS_STUDENT = TeacherReader()


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer with its chat template, loaded without MLX. Raises what transformers does."""
    with importing:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenise(
    row: Row, index: int, tokenizer: Any, eos_ids: Sequence[int], reader: TeacherReader = SAME_AS_STUDENT
) -> Prompt:
    """Turn a row into ids.

    Messages go through the chat template, or are joined by lines where the tokenizer has none. A plain text is cut in
    the middle: its first half is the prompt, the rest the reference.
    """
    teacher_ids = reader.ids(row, tokenizer)
    if not row.messages:
        ids = tuple(tokenizer.encode(row.text))
        middle = (len(ids) + 1) // 2
        return Prompt(index, row.text, ids[:middle], (*ids[middle:], *eos_ids[:1]), row.place)
    ids = _render(tokenizer, row.messages, row.place)
    reference = None if row.completion is None else _reference(tokenizer, row, ids, eos_ids)
    return Prompt(index, row.prompt, ids, reference, row.place, teacher_ids)


def _reference(tokenizer: Any, row: Row, prompt_ids: tuple[int, ...], eos_ids: Sequence[int]) -> tuple[int, ...]:
    whole = _render(tokenizer, row.messages, row.place, answer=row.completion)
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        answer = whole[len(prompt_ids) :]
    else:  # some templates rewrite earlier turns once an answer follows
        answer = tuple(tokenizer.encode(row.completion, add_special_tokens=False))
    ends = [place for place, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0] + 1] if ends else (*answer, *eos_ids[:1])


def _render(
    tokenizer: Any, messages: Sequence[dict[str, str]], place: str, answer: str | None = None
) -> tuple[int, ...]:
    from jinja2 import TemplateError

    turns = [dict(message) for message in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    if getattr(tokenizer, "chat_template", None) is None:
        return tuple(tokenizer.encode("\n".join(turn["content"] for turn in turns)))
    try:
        return tuple(
            tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=True, return_dict=False)
        )
    except TemplateError as fault:
        message = f"{place}: the chat template refuses it: {' '.join(str(fault).split())}"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message, place=place) from fault


def _parse_line(line: bytes, place: str) -> Row | str:
    try:
        content = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as fault:
        return (
            f"{place}: not UTF-8 (byte 0x{line[fault.start]:02x} at column {fault.start + 1}); save the file as UTF-8"
        )
    except json.JSONDecodeError as fault:
        return f"{place}: not JSON: {fault.msg} at column {fault.colno}; give one JSON object a line"
    except ValueError:  # Python refuses integers of more than 4300 digits
        return f"{place}: not a row: it holds a number too long to read"
    except RecursionError:
        return f"{place}: not a row: nested too deeply"
    if not isinstance(content, dict):
        return f"{place}: not a JSON object; give {EXPECTED}"
    return _parse_row(content, place)


def _parse_row(content: dict[str, Any], place: str) -> Row | str:
    content = {name: value for name, value in content.items() if value is not None}
    row = _parse_student_row(content, place)
    if isinstance(row, str) or not any(key in content for key in TEACHER_KEYS):
        return row
    return _with_teacher_messages(row, content)


def _with_teacher_messages(row: Row, content: dict[str, Any]) -> Row | str:
    if not row.messages:
        return f"{row.place}: a plain text is the same for both models; give messages, or leave out the teacher's"
    if "teacher_messages" in content:
        parsed = _parse_messages(content["teacher_messages"], "teacher_messages", row.place)
        if isinstance(parsed, str):
            return parsed
        if parsed.completion is not None:
            return f'{row.place}: "teacher_messages" ends with an answer; end it with what is to be answered'
        return replace(row, teacher_messages=parsed.messages)
    if fault := _text_fault(content["teacher_prompt"]):
        return f'{row.place}: "teacher_prompt" {fault}'
    last = {"role": row.messages[-1]["role"], "content": content["teacher_prompt"]}
    return replace(row, teacher_messages=(*row.messages[:-1], last))


def _parse_student_row(content: dict[str, Any], place: str) -> Row | str:
    if "messages" in content:
        return _parse_messages(content["messages"], "messages", place)
    if isinstance(content.get("prompt"), list):
        return _parse_messages(content["prompt"], "prompt", place)
    for name in ("prompt", "completion", "text"):
        if name in content and (fault := _text_fault(content[name])):
            return f'{place}: "{name}" {fault}'
    if "prompt" in content:
        message = {"role": "user", "content": content["prompt"]}
        return Row(place, (message,), completion=content.get("completion"))
    if "text" in content:
        return Row(place, (), text=content["text"])
    keys = ", ".join(f'"{key}"' for key in list(content)[:4]) or "no keys"
    return f"{place}: has {keys}; give {EXPECTED}"


def _parse_messages(messages: object, name: str, place: str) -> Row | str:
    if not isinstance(messages, list) or not messages:
        return f'{place}: "{name}" is not a list of messages'
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'{place}: message {number} of "{name}" has no "role"'
        if fault := _text_fault(message.get("content")):
            return f'{place}: "content" of message {number} {fault}'
        turns.append({"role": message["role"], "content": message["content"]})
    completion = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not any(turn["role"] == "user" for turn in turns):
        return f'{place}: "{name}" has no message of role "user" to answer'
    return Row(place, tuple(turns), completion=completion)


def _text_fault(value: object) -> str:
    if not isinstance(value, str):
        return f"is {json.dumps(value)[:40]}, not a text"
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return ""
