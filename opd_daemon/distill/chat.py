"""Chat templates, rendered from a model folder's files alone: two of them can be compared before anything loads.

A template is the model's own text in jinja2; it runs in jinja2's sandbox, as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from time import strftime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_daemon.errors import OpdError, Reason

Message = Mapping[str, str]

PROBE = ({"role": "user", "content": "How do you do?"},)
SHOWN_DIFFERENCES = 3
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template. tokens: the special tokens it may name, such as bos_token."""

    folder: Path
    source: str
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """The text a model reads before it answers these messages.

        Raises:
            OpdError: INVALID_RUN_CONFIG when the template refuses them, as some do a system message.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": strftime}
        try:
            template = environment.from_string(self.source)
            return template.render(messages=list(messages), add_generation_prompt=True, **self.tokens)
        except TemplateError as fault:
            message = f"the chat template of {self.folder} refuses it: {' '.join(str(fault).split())}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, path=self.folder) from fault


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a model folder; None where it has none, or none that can be read."""
    settings = _read_json(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    tokens = {name: _text(value) for name, value in settings.items() if name.endswith("_token")}
    return ChatTemplate(folder, source, {name: text for name, text in tokens.items() if text is not None})


def compare_templates(student: Path, teacher: Path) -> str:
    """Where the two models' templates render a question differently, in words; empty when they render it alike."""
    ours, theirs = read_template(student), read_template(teacher)
    if ours is None and theirs is None:
        return ""
    if ours is None or theirs is None:
        return f"only the {'teacher' if ours is None else 'student'} has one"
    found = difference(ours.render(PROBE), theirs.render(PROBE))
    return f"student / teacher: {found}" if found else ""


def difference(ours: str, theirs: str) -> str:
    """The first few places where two renderings differ, `'ours' / 'theirs'`; empty when they don't."""
    words: list[list[str]] = [re.findall(r"\w+|\W", text) for text in (ours, theirs)]
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=False)
    changes = [entry for entry in matcher.get_opcodes() if entry[0] != "equal"]
    shown = [
        f"{_shown(words[0][start:end])} / {_shown(words[1][other:until])}"
        for _, start, end, other, until in changes[:SHOWN_DIFFERENCES]
    ]
    return ", ".join(shown)


def _shown(words: Sequence[str]) -> str:
    text = "".join(words)
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…")


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _to_json(value: Any, **settings: Any) -> str:
    # jinja2's own escapes what HTML would read as markup.
    return json.dumps(value, ensure_ascii=False, **settings)


def _refuse(message: str) -> None:
    raise TemplateError(message)
