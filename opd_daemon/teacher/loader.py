"""From the name of a model to a teacher that answers: check, fingerprint, load, warm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opd_daemon.errors import OpdError
from opd_daemon.failpoints import hit
from opd_daemon.models.folder import ModelFolder
from opd_daemon.teacher.digest import DigestMemo
from opd_daemon.teacher.engine import Engine
from opd_daemon.teacher.folder import load_failed, open_folder
from opd_daemon.teacher.known import KnownTeachers
from opd_daemon.teacher.loading import LoadedModel, check_architecture, load, warm
from opd_daemon.teacher.memory import check_memory
from opd_daemon.teacher.tokenizer import TextTokenizer
from opd_daemon.types import LoadProgress, TeacherInfo
from opd_daemon.vocabulary import load_vocabulary, vocabulary_digest

logger = logging.getLogger(__name__)

Report = Callable[[LoadProgress | OpdError], None]


@dataclass(frozen=True, slots=True)
class Resident:
    """The teacher in memory, as the event loop knows it."""

    info: TeacherInfo
    tokenizer: TextTokenizer


class Progress:
    """Reports of one phase, a percent or more apart."""

    def __init__(self, phase: str, report: Report) -> None:
        self._phase, self._report = phase, report
        self._reached = -1.0
        self.reach(0.0)

    def reach(self, fraction: float) -> None:
        """Report `fraction` if that is news."""
        if fraction >= self._reached + 0.01 or (fraction >= 1.0 > self._reached):
            self._reached = fraction
            self._report(LoadProgress(self._phase, fraction))


class Loader:
    """Exchanges the engine's model. `resident` is the teacher that answers, `failure` why there is none."""

    def __init__(self, engine: Engine, digests: DigestMemo, known: KnownTeachers, files: Executor) -> None:
        self._engine = engine
        self._digests = digests
        self._known = known
        self._files = files
        self.resident: Resident | None = None
        self.failure: OpdError | None = None

    async def load(self, model: str, report: Report) -> None:
        """Load `model`, telling `report` every step; the last report is the phase ready, or the error."""
        try:
            self.resident = await self._find_and_load(model, report)
        except Exception as error:  # noqa: BLE001 - whatever a model's files do, the daemon stays up
            failure = error if isinstance(error, OpdError) else _unexpected(model, error)
            # A fault found before the exchange leaves the present teacher as it is.
            if self.resident is None:
                self.failure = failure
            report(failure)
        else:
            self.failure = None
            logger.info("teacher %s is ready (digest %s)", self.resident.info.name, self.resident.info.digest[:12])
            report(LoadProgress("ready", 1.0, self.resident.info.name))

    async def unload(self) -> None:
        """Free the teacher's memory."""
        self.resident = self.failure = None
        await asyncio.wrap_future(self._engine.drop())

    async def _find_and_load(self, model: str, report: Report) -> Resident:
        loop = asyncio.get_running_loop()
        report(LoadProgress("checking", 0.0, model))
        await loop.run_in_executor(self._files, hit, "teacher.load")
        folder = await loop.run_in_executor(self._files, open_folder, model)
        await asyncio.wrap_future(self._engine.submit(partial(check_architecture, folder)))
        vocab_size, tokenizer_digest = await loop.run_in_executor(self._files, _vocabulary, folder.path, model)
        hashing = Progress("hashing", report)
        digest = await loop.run_in_executor(self._files, self._digests.digest, folder, hashing.reach)
        present = self.resident
        if present and (present.info.digest, present.info.tokenizer_digest) == (digest, tokenizer_digest):
            return present
        check_memory(folder, present.info.weight_bytes if present else 0)
        self.resident = None
        loading = partial(_load_all, folder, vocab_size, report)
        loaded, tokenizer = await asyncio.wrap_future(self._engine.replace(digest, folder.eos_token_ids, loading))
        info = _describe(folder, loaded, digest, tokenizer_digest)
        await loop.run_in_executor(self._files, self._known.remember, info)
        return Resident(info, tokenizer)


def _vocabulary(path: Path, called: str) -> tuple[int, str]:
    vocabulary = load_vocabulary(path, called)
    return max(vocabulary) + 1, vocabulary_digest(vocabulary)


def _load_all(folder: ModelFolder, vocab_size: int, report: Report) -> tuple[LoadedModel, TextTokenizer]:
    loading = Progress("loading", report)
    tokenizer = TextTokenizer(folder.path, folder.name)
    loaded = load(folder, vocab_size, loading.reach)
    report(LoadProgress("warming", 0.0))
    warm(loaded)
    return loaded, tokenizer


def _unexpected(model: str, error: Exception) -> OpdError:
    logger.error("loading %s failed", model, exc_info=error)
    return load_failed(model, "it can't be loaded; the daemon's log says why")


def _describe(folder: ModelFolder, loaded: LoadedModel, digest: str, tokenizer_digest: str) -> TeacherInfo:
    parts = loaded.parts
    return TeacherInfo(
        name=folder.name,
        path=str(folder.path),
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        architecture=str(folder.config["model_type"]),
        vocab_size=loaded.vocab_size,
        padded_vocab_size=parts.width,
        hidden_size=parts.hidden_size,
        max_context=folder.max_context,
        weight_bytes=folder.weight_bytes,
        dtype=str(parts.dtype).removeprefix("mlx.core."),
        quantization_bits=folder.bits,
        supports_hidden=not parts.refusal,
        hidden_refusal=parts.refusal,
        eos_token_ids=folder.eos_token_ids,
    )
