"""Finding a teacher's model folder, on disk or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import user_path
from opd_daemon.models.folder import FolderFault, ModelFolder, read_folder
from opd_daemon.types import TeacherInfo

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_folder(path_or_hub_id: str) -> ModelFolder:
    """Find the model and check everything that needs no weights.

    A hub id is only tried when it is no existing folder. Raises MODEL_NOT_FOUND where there is no model, or
    TEACHER_LOAD_FAILED with what is wrong with the one there is, in one line.
    """
    path = user_path(path_or_hub_id)
    if not _exists(path):
        path = _download(path_or_hub_id)
    path = path.resolve()
    try:
        return read_folder(path, path_or_hub_id if HUB_ID.fullmatch(path_or_hub_id) else "")
    except FolderFault as fault:
        if fault.missing:
            message = f"{path_or_hub_id}: {fault.problem}, or a hub id"
            raise OpdError(Reason.MODEL_NOT_FOUND, message, model=path_or_hub_id) from None
        inside = "" if fault.place == path else f"{fault.place.name}: "
        raise load_failed(path_or_hub_id, f"{inside}{fault.problem}") from None


def is_model(info: TeacherInfo | None, model: str) -> bool:
    """Whether this teacher is what a folder or hub id means; None is no model. A folder may have several paths."""
    if info is None:
        return False
    path = user_path(model)
    return info.path == os.path.realpath(path) if _exists(path) else info.name == model


def is_hub_id(name: str) -> bool:
    """Whether a name means a model on the hub: it looks like one, and no folder here has it."""
    return HUB_ID.fullmatch(name) is not None and not _exists(user_path(name))


def load_failed(model: str | Path, cause: str) -> OpdError:
    """A failure to load `model` with its cause in one line."""
    return OpdError(Reason.TEACHER_LOAD_FAILED, f"{model}: {cause}", model=model, cause=cause)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - unlike Path.exists, never raises for a name too long


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise OpdError(Reason.MODEL_NOT_FOUND, f"no model folder {name!r}; give a folder or a hub id", model=name)
    from huggingface_hub import snapshot_download  # seconds to import, and only needed here
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise OpdError(
            Reason.MODEL_NOT_FOUND,
            f"no model folder {name!r}, and the hub has no such model or can't be reached",
            model=name,
        ) from error
