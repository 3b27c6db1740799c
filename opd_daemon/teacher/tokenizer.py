"""Text and chats to the teacher's token ids and back; no MLX arrays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_daemon.errors import invalid
from opd_daemon.imports import importing
from opd_daemon.teacher import mlxlm
from opd_daemon.teacher.folder import load_failed


class TextTokenizer:
    """The tokenizer and chat template of one model folder. Thread-safe."""

    def __init__(self, path: Path, name: str) -> None:
        """Load it. Raises TEACHER_LOAD_FAILED when its files can't be used without running the model's own code."""
        try:
            with importing:
                self._tokenizer: Any = mlxlm.module("utils").load_tokenizer(path, {"trust_remote_code": False})
            self._tokenizer.encode("")
        except Exception as error:  # third-party loaders may raise anything over a folder's files
            raise load_failed(name, f"its tokenizer can't be loaded ({' '.join(str(error).split())[:200]})") from error
        self._name = name
        # Those in Rust are for any number of readers, once a first call has unset what their files say of padding.
        self._turn = contextlib.nullcontext() if getattr(self._tokenizer, "is_fast", False) else threading.Lock()

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.has_chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text, with the special tokens the tokenizer adds by itself."""
        with self._turn:
            return tuple(self._tokenizer.encode(text))

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> tuple[int, ...]:
        """Ids of a chat under the model's template. Raises INVALID_REQUEST where that can't be done."""
        if not self.has_template:
            raise invalid("messages", f"{self._name} has no chat template; send text or token ids")
        try:
            with self._turn:
                ids = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise invalid("messages", f"the chat template of {self._name} refuses them: {error}") from error
        return tuple(int(index) for index in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        with self._turn:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
