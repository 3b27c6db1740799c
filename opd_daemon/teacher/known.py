"""Teachers that were loaded here before: the cache answers for them when they are not in memory."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher.memo import Memo
from opd_daemon.teacher.tokenizer import TextTokenizer
from opd_daemon.types import TeacherInfo
from opd_daemon.vocabulary import load_vocabulary, vocabulary_digest


class KnownTeachers:
    """Facts of every teacher by its digest, in one JSON file, and the tokenizer asked for last. Thread-safe."""

    def __init__(self, file: Path) -> None:
        self._memo = Memo(file)
        self._lock = threading.Lock()
        self._tokenizer: tuple[str, TextTokenizer] | None = None

    def remember(self, info: TeacherInfo) -> None:
        """Keep the facts of a teacher that was loaded."""
        with self._lock:
            facts = asdict(info) | {"eos_token_ids": list(info.eos_token_ids)}
            if self._memo.entries.get(info.digest) != facts:
                self._memo.entries[info.digest] = facts
                self._memo.save()

    def find(self, digest: str) -> TeacherInfo | None:
        """The teacher with this digest, if it was ever loaded."""
        with self._lock:
            facts: dict[str, Any] = self._memo.entries.get(digest) or {}
        try:
            return TeacherInfo(**facts | {"eos_token_ids": tuple(facts["eos_token_ids"])})
        except (TypeError, KeyError):  # none, or one an older version wrote
            return None

    def tokenizer(self, info: TeacherInfo) -> TextTokenizer:
        """The tokenizer of a known teacher; reads files. Raises TEACHER_NOT_LOADED when it isn't where it was."""
        with self._lock:
            if self._tokenizer is None or self._tokenizer[0] != info.tokenizer_digest:
                self._tokenizer = info.tokenizer_digest, _load(info)
            return self._tokenizer[1]


def _load(info: TeacherInfo) -> TextTokenizer:
    path = Path(info.path)
    try:
        if vocabulary_digest(load_vocabulary(path)) == info.tokenizer_digest:
            return TextTokenizer(path, info.name)
    except (OpdError, OSError, ValueError):
        pass  # told below
    message = f"{info.name} is not in memory, and its tokenizer is no longer where it was; load the teacher again"
    raise OpdError(Reason.TEACHER_NOT_LOADED, message, digest=info.digest)
