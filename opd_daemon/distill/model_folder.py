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

LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Type (safetensors' name for it), shape and size of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete mlx-lm model folder. tensors: header of every tensor, by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def bits(self) -> int:
        """Bits a quantised weight has by default; 0 for a model that isn't quantised."""
        quantization = self.config.get("quantization")
        bits = quantization.get("bits", 0) if isinstance(quantization, dict) else 0
        return bits if isinstance(bits, int) else 0

    @property
    def parameters(self) -> int:
        """Number of weights, quantised ones counted as what they stand for."""
        packed = 32 // self.bits if self.bits else 1
        weights = ((name, tensor) for name, tensor in self.tensors.items() if name.endswith("weight"))
        return sum(math.prod(tensor.shape) * (packed if tensor.dtype == "U32" else 1) for _, tensor in weights)

    def number(self, name: str, default: int = 0) -> int:
        """An integer of the configuration, also from the `text_config` of a model that reads images too."""
        inner = self.config.get("text_config")
        value = self.config.get(name, inner.get(name) if isinstance(inner, dict) else None)
        return int(value) if isinstance(value, int | float) and math.isfinite(value) else default


def read_model_folder(path: Path) -> ModelFolder:
    """Read a folder and check that every shard is there and as long as its header says.

    Raises:
        OpdError: MODEL_NOT_FOUND naming the folder or file and what is wrong with it.
    """
    if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, never raises for a name too long
        problem = "is a file, not a model folder" if os.path.lexists(path) else "no such folder"
        raise _no_model(path, f"{problem}; give an mlx-lm model folder (config.json and model*.safetensors)")
    config = _read_json(path / "config.json")
    if "model_type" not in config:
        raise _no_model(path / "config.json", "has no 'model_type', so no model can be built from it")
    shards = sorted(path.glob("model*.safetensors"))
    if not shards:
        raise _no_model(path, "holds no model*.safetensors; download the weights, or convert them with mlx_lm.convert")
    _check_index(path)
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        tensors |= read_header(shard)
    return ModelFolder(path, config, tensors)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, whose length must agree with its header.

    Raises:
        OpdError: MODEL_NOT_FOUND naming the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
            if length > min(LARGEST_HEADER, size):
                raise _no_model(path, "not a safetensors file, or cut off")
            content: dict[str, Any] = json.loads(file.read(length))
        content.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in content.items()}
        end = max((int(entry["data_offsets"][1]) for entry in content.values()), default=0)
    except FileNotFoundError:
        raise _no_model(path, "no such file") from None
    except OSError as fault:
        raise _no_model(path, f"can't be read: {fault.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _no_model(path, "its header is broken; copy the file again") from None
    if size != 8 + length + end:
        raise _no_model(path, f"{size} bytes long instead of {8 + length + end}; copy the file again")
    return tensors


def _tensor(entry: dict[str, Any]) -> TensorHeader:
    first, last = entry["data_offsets"]
    return TensorHeader(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), int(last) - int(first))


def _check_index(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    mapping = _read_json(index).get("weight_map")
    names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
    missing = [name for name in names if not (path / str(name)).is_file()]
    if missing:
        raise _no_model(path, f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _no_model(path, "no such file; an mlx-lm model folder has one") from None
    except OSError as fault:
        raise _no_model(path, f"can't be read: {fault.strerror}") from None
    except (ValueError, RecursionError):
        raise _no_model(path, "can't be read: it is not valid JSON; copy the file again") from None
    if not isinstance(content, dict):
        raise _no_model(path, "is not a JSON object")
    return content


def _no_model(path: Path, problem: str) -> OpdError:
    return OpdError(Reason.MODEL_NOT_FOUND, f"{path}: {problem}", path=path)
