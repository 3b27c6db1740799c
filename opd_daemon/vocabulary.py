"""What the ids of a model folder mean: read, fingerprint and compare vocabularies without loading a model.

Two models can be distilled when every id both know means the same token. Ids that only one side knows are masked on
both (Qwen3 is Qwen2.5 plus four tokens), so a padded or superset vocabulary is no fault.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon.errors import OpdError, Reason
from opd_daemon.imports import importing

SHOWN_DISAGREEMENTS = 5
OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class VocabularyMatch:
    """How a teacher's and a student's vocabulary fit together.

    shared_size: ids that mean the same token on both sides. only_teacher, only_student: ids known to one side, to be
    masked on both. disagreements: the first few (id, teacher's token, student's token) that differ.
    """

    shared_size: int
    only_teacher: tuple[int, ...]
    only_student: tuple[int, ...]
    disagreements: tuple[tuple[int, str, str], ...]

    @property
    def compatible(self) -> bool:
        """Whether no shared id means two different tokens."""
        return not self.disagreements

    @property
    def unshared(self) -> tuple[int, ...]:
        """Ids that only one side knows."""
        return (*self.only_teacher, *self.only_student)


def ids_below(ids: Iterable[int], size: int) -> tuple[int, ...]:
    """Those of the ids that a model of this vocabulary size has, so that it can be asked to mask them."""
    return tuple(index for index in ids if index < size)


def load_vocabulary(path: Path, called: str = "") -> dict[int, str]:
    """Token of every id of the tokenizer in the model folder `path`, added and special tokens included.

    called: what a client calls the folder. Raises MODEL_NOT_FOUND when it has no tokenizer that can be read.
    """
    called = called or str(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        return _load_with_transformers(path, called)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = _model_tokens(content["model"]["vocab"])
        vocabulary.update({int(token["id"]): str(token["content"]) for token in content.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(called, "tokenizer.json is broken") from error
    return vocabulary


def vocabulary_digest(vocabulary: Mapping[int, str]) -> str:
    """sha256 over the (id, token) pairs in order of id, as hexadecimal."""
    lines = "\n".join(f"{index}\t{json.dumps(vocabulary[index])}" for index in sorted(vocabulary))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def compare_vocabularies(teacher: Mapping[int, str], student: Mapping[int, str]) -> VocabularyMatch:
    """Compare by content; sizes don't matter."""
    shared = teacher.keys() & student.keys()
    differing = sorted(index for index in shared if teacher[index] != student[index])
    return VocabularyMatch(
        shared_size=len(shared) - len(differing),
        only_teacher=tuple(sorted(teacher.keys() - shared)),
        only_student=tuple(sorted(student.keys() - shared)),
        disagreements=tuple((index, teacher[index], student[index]) for index in differing[:SHOWN_DISAGREEMENTS]),
    )


def _model_tokens(vocab: Any) -> dict[int, str]:
    if isinstance(vocab, list):  # Unigram: [[token, score], …], the id is the place
        return {index: str(entry[0]) for index, entry in enumerate(vocab)}
    return {int(index): str(token) for token, index in vocab.items()}


def _load_with_transformers(path: Path, called: str) -> dict[int, str]:
    # Without any file transformers would make up an empty tokenizer.
    if not any(any(path.glob(pattern)) for pattern in OTHER_TOKENIZER_FILES):
        raise _unreadable(called, "it holds no tokenizer.json or other tokenizer file")
    try:
        with importing:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(called, "its tokenizer files can't be read") from error
    return {int(index): str(token) for token, index in tokenizer.get_vocab().items()}


def _unreadable(called: str, cause: str) -> OpdError:
    return OpdError(
        Reason.MODEL_NOT_FOUND,
        f"no tokenizer in {called}: {cause}; copy the tokenizer files of the model into the folder",
        path=called,
        cause=cause,
    )
