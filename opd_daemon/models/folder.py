"""What a model folder holds, read from its configuration and the headers of its weight files, in milliseconds."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon.errors import OpdError, Reason

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "model_max_length")
UNLIMITED_CONTEXT = 1 << 20
LARGEST_HEADER = 100_000_000

CURE = "give an mlx-lm model folder (config.json and model*.safetensors)"


class FolderFault(OpdError):
    """MODEL_NOT_FOUND with its parts: `place` is the folder or file at fault, `problem` says what and how to cure it.

    missing: there is no model here at all, as opposed to one that is damaged.
    """

    def __init__(self, place: Path, problem: str, *, missing: bool = False) -> None:
        super().__init__(Reason.MODEL_NOT_FOUND, f"{place}: {problem}", path=place)
        self.place = place
        self.problem = problem
        self.missing = missing


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Type (safetensors' name for it), shape and size of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def value_bytes(self) -> float:
        """Bytes of one stored value."""
        return self.bytes / max(1, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete mlx-lm model folder. name: what people call it. tensors: header of every tensor, by name."""

    name: str
    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, TensorHeader]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def bits(self) -> int:
        """Bits a quantised weight has by default; 0 for a model that isn't quantised."""
        settings = self.config.get("quantization") or self.config.get("quantization_config")
        bits = settings.get("bits", 0) if isinstance(settings, dict) else 0
        return bits if isinstance(bits, int) else 0

    @property
    def max_context(self) -> int:
        """Longest sequence the positions of the model allow."""
        return next((value for key in CONTEXT_KEYS if (value := self.number(key))), UNLIMITED_CONTEXT)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; generation_config.json speaks before config.json."""
        settings = read_json(self.path / "generation_config.json", {})
        named = settings.get("eos_token_id") if isinstance(settings, dict) else None
        found = named or self.config.get("eos_token_id")
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (int(found),)

    def number(self, name: str, default: int = 0) -> int:
        """An integer of the configuration, also from the `text_config` of a model that reads images too."""
        inner = self.config.get("text_config")
        value = self.config.get(name, inner.get(name) if isinstance(inner, dict) else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return default
        return int(value)


def read_folder(path: Path, name: str = "") -> ModelFolder:
    """Read a folder and check that every shard is there and as long as its header says. Raises FolderFault."""
    if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, never raises for a name too long
        problem = "is a file, not a model folder" if os.path.lexists(path) else "no such folder"
        raise FolderFault(path, f"{problem}; {CURE}", missing=True)
    config = _read_config(path)
    _check_index(path)
    shards = tuple(sorted(path.glob("model*.safetensors")))
    if not shards:
        cure = "download the weights, or convert them with mlx_lm.convert"
        raise FolderFault(path, f"holds no model*.safetensors; {cure}")
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        tensors |= read_header(shard)
    return ModelFolder(name or path.name, path, config, shards, tensors)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, whose length must agree with its header. Raises FolderFault."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
            if length > min(LARGEST_HEADER, size):
                raise FolderFault(path, "not a safetensors file, or cut off; copy it again")
            content: dict[str, Any] = json.loads(file.read(length))
        content.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in content.items()}
        end = max((int(entry["data_offsets"][1]) for entry in content.values()), default=0)
    except FileNotFoundError:
        raise FolderFault(path, "no such file", missing=True) from None
    except OSError as fault:
        raise FolderFault(path, f"can't be read: {fault.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FolderFault(path, "its header is broken; copy the file again") from None
    if size != 8 + length + end:
        how = "cut off" if size < 8 + length + end else "too long"
        raise FolderFault(path, f"{how}: {size} bytes instead of {8 + length + end}; copy the file again")
    return tensors


def read_json(file: Path, default: Any) -> Any:
    """Content of a JSON file; `default` where there is none or it can't be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return default


def _tensor(entry: dict[str, Any]) -> TensorHeader:
    first, last = entry["data_offsets"]
    return TensorHeader(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), int(last) - int(first))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise FolderFault(path, f"not a model folder, it has no config.json; {CURE}", missing=True)
    config = _read_object(file)
    if "model_type" not in config:
        raise FolderFault(file, "has no 'model_type', so no model can be built from it")
    if "model_file" in config:
        raise FolderFault(file, f"asks to run the model's own code ({config['model_file']}); refused")
    return config


def _check_index(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    mapping = _read_object(index).get("weight_map")
    names = sorted({str(name) for name in mapping.values()}) if isinstance(mapping, dict) else []
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FolderFault(path, f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise FolderFault(path, f"can't be read: {fault.strerror}") from None
    except (ValueError, RecursionError):
        raise FolderFault(path, "can't be read: it is not valid JSON; copy the file again") from None
    if not isinstance(content, dict):
        raise FolderFault(path, "is not a JSON object")
    return content
