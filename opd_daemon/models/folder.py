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
from opd_daemon.paths import open_plain

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "model_max_length")
LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
UNLIMITED_CONTEXT = 1 << 20
# Far above what models have (a shard of the largest: some thousand tensors), far below what hurts to parse.
LARGEST_HEADER = 32 << 20
LARGEST_JSON = 64 << 20
MOST_TENSORS = 50_000
MOST_SIDES = 8

# Bytes of a value, by safetensors' names.
VALUE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
WEIGHT_TYPES = frozenset({"F32", "F16", "BF16"})
# What turns packed integers or 8-bit floats into weights, beside them under these names.
SCALES = ("scales", "weight_scale", "weight_scale_inv")

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
    _check_types(path, tensors)
    _check_layers(path, config, len(tensors))
    return ModelFolder(name or path.name, path, config, shards, tensors)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file. Raises FolderFault.

    Its length, types, shapes and offsets must agree: every byte belongs to one tensor, of just its size.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
            if length > min(LARGEST_HEADER, size):
                raise FolderFault(path, "not a safetensors file, or cut off; copy it again")
            content: dict[str, Any] = json.loads(file.read(length))
        content.pop("__metadata__", None)
        if len(content) > MOST_TENSORS:
            raise FolderFault(path, f"lists {len(content)} tensors, more than the {MOST_TENSORS} a file may have")
        tensors = {name: _tensor(path, name, entry) for name, entry in content.items()}
        end = _end(path, content)
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
        return json.loads(_read_text(file))
    except (OSError, ValueError, RecursionError):
        return default


def _read_text(file: Path) -> str:
    """A small file. Raises OSError, and ValueError for one that is no JSON by its size alone, or not UTF-8."""
    with open_plain(file) as content:
        data = content.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    return data.decode("utf-8")


def _tensor(path: Path, name: str, entry: dict[str, Any]) -> TensorHeader:
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError
    tensor = TensorHeader(str(dtype), tuple(shape), last - first)
    if dtype not in VALUE_BYTES:
        raise FolderFault(path, f"{name} has values of type {str(dtype)[:40]!r}, which is unknown; convert the model")
    # Python's integers don't overflow, whatever the shape.
    if len(shape) > MOST_SIDES or VALUE_BYTES[dtype] * math.prod(shape) != tensor.bytes:
        told = f"{dtype} of shape {str(tensor.shape)[:80]} in {tensor.bytes} bytes"
        raise FolderFault(path, f"its header is broken: {name} can't be {told}; copy the file again")
    return tensor


def _end(path: Path, content: dict[str, Any]) -> int:
    """Where the last tensor ends; each begins where the one before it ends."""
    end = 0
    for first, last in sorted(tuple(entry["data_offsets"]) for entry in content.values()):
        if first != end:
            raise FolderFault(path, "its header is broken: tensors overlap or leave gaps; copy the file again")
        end = last
    return int(end)


def _check_types(path: Path, tensors: dict[str, TensorHeader]) -> None:
    """MLX would take the bits of such weights for numbers, and the model would talk nonsense."""
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.dtype not in WEIGHT_TYPES and not any(f"{layer}.{s}" in tensors for s in SCALES):
            cure = "convert the model with mlx_lm.convert"
            raise FolderFault(path, f"{name} is {tensor.dtype} and has no scales, so it holds no weights; {cure}")


def _check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Building a billion layers, to see then that there are no weights for them, would take the daemon with it."""
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, dict) else {}):
        for key in LAYER_KEYS:
            if isinstance(layers := settings.get(key), int) and layers > tensors:
                raise FolderFault(path / "config.json", f"{key} is {layers}, but there are only {tensors} tensors")


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
        content = json.loads(_read_text(path))
    except OSError as fault:
        raise FolderFault(path, f"can't be read: {fault.strerror}") from None
    except (ValueError, RecursionError):
        raise FolderFault(path, "can't be read: it is not valid JSON; copy the file again") from None
    if not isinstance(content, dict):
        raise FolderFault(path, "is not a JSON object")
    return content
