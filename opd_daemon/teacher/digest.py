"""Fingerprint of a model's weights and configuration, remembered as long as the files stay as they are."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from opd_daemon.teacher.folder import ModelFolder, read_json

logger = logging.getLogger(__name__)

READ_BYTES = 8 << 20


class DigestMemo:
    """File digests by path, size, times and inode, in one JSON file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        content = read_json(file, {})
        self._known: dict[str, list[object]] = content if isinstance(content, dict) else {}

    def digest(self, model: ModelFolder, report: Callable[[float], None]) -> str:
        """sha256 over config.json and the content of every shard; `report` gets the fraction done."""
        files = (model.path / "config.json", *model.shards)
        total = sum(file.stat().st_size for file in files)
        done = 0
        whole = hashlib.sha256()
        for file in files:
            value = self._of_file(file, lambda count: report((done + count) / total))  # noqa: B023 - used at once
            whole.update(f"{file.name}\0{value}\n".encode())
            done += file.stat().st_size
            report(done / total)
        try:
            self._save()
        except OSError as error:
            logger.warning("digests are not remembered (%s); the next load computes them again", error.strerror)
        return whole.hexdigest()

    def _of_file(self, file: Path, report: Callable[[int], None]) -> str:
        stat = file.stat()
        stamp: list[object] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(file))
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        value = _sha256(file, report)
        self._known[str(file)] = [*stamp, value]
        return value

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(self._known, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._file)


def _sha256(file: Path, report: Callable[[int], None]) -> str:
    value, done = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            value.update(block)
            done += len(block)
            report(done)
    return value.hexdigest()
