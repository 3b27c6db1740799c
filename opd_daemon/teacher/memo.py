"""What is remembered between two starts of the daemon: small JSON files that are replaced whole."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from opd_daemon.models.folder import read_json

logger = logging.getLogger(__name__)


class Memo:
    """A JSON object in a file. One that can't be read counts as empty, one that can't be written is a warning."""

    def __init__(self, file: Path) -> None:
        self._file = file
        content = read_json(file, {})
        self.entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def save(self) -> None:
        """Write the entries to the disk, all or nothing."""
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump(self.entries, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._file)
        except OSError as error:
            logger.warning("%s is not kept (%s); it will be found out again", self._file.name, error.strerror)
