"""Fingerprint of a model's weights and configuration, remembered as long as the files stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from opd_daemon.models.folder import ModelFolder
from opd_daemon.teacher.memo import Memo

READ_BYTES = 8 << 20


class DigestMemo:
    """File digests by path, size, times and inode, in one JSON file."""

    def __init__(self, file: Path) -> None:
        self._memo = Memo(file)

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
        self._memo.save()
        return whole.hexdigest()

    def _of_file(self, file: Path, report: Callable[[int], None]) -> str:
        stat = file.stat()
        stamp: list[object] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._memo.entries.get(str(file))
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        value = _sha256(file, report)
        self._memo.entries[str(file)] = [*stamp, value]
        return value


def _sha256(file: Path, report: Callable[[int], None]) -> str:
    value, done = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            value.update(block)
            done += len(block)
            report(done)
    return value.hexdigest()
