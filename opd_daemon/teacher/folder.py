"""What can be known of a model folder before any weight is loaded, and everything that can be wrong with it."""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import user_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "model_max_length")
UNLIMITED_CONTEXT = 1 << 20
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder whose configuration and shards are complete. `weight_bytes` is what the tensors take in memory."""

    name: str
    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    weight_bytes: int

    @property
    def max_context(self) -> int:
        """Longest sequence the positions of the model allow."""
        for settings in (self.config, self.config.get("text_config") or {}):
            for key in CONTEXT_KEYS:
                if isinstance(settings.get(key), int):
                    return int(settings[key])
        return UNLIMITED_CONTEXT

    @property
    def quantization_bits(self) -> int:
        """Bits of a quantised weight, 0 when the model isn't quantised."""
        settings = self.config.get("quantization") or self.config.get("quantization_config") or {}
        return int(settings.get("bits", 0))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; generation_config.json speaks before config.json."""
        found = read_json(self.path / "generation_config.json", {}).get("eos_token_id") or self.config.get(
            "eos_token_id"
        )
        return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)


def open_folder(path_or_hub_id: str) -> ModelFolder:
    """Find the model and check everything that needs no weights.

    A hub id is only tried when it is no existing folder. Raises MODEL_NOT_FOUND, or TEACHER_LOAD_FAILED with the
    cause in one line.
    """
    path = user_path(path_or_hub_id)
    if not os.path.exists(path):  # noqa: PTH110 - unlike Path.exists, never raises for a name too long
        path = _download(path_or_hub_id)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise load_failed(
            path_or_hub_id, "not a model folder (it has no config.json); give an mlx-lm model folder or a hub id"
        )
    config = _read_config(path, path_or_hub_id)
    shards = _find_shards(path, path_or_hub_id)
    weight_bytes = sum(_check_shard(shard, path_or_hub_id) for shard in shards)
    name = path_or_hub_id if HUB_ID.fullmatch(path_or_hub_id) else path.resolve().name
    return ModelFolder(name, path.resolve(), config, shards, weight_bytes)


def load_failed(model: str | Path, cause: str) -> OpdError:
    """A failure to load `model` with its cause in one line."""
    return OpdError(Reason.TEACHER_LOAD_FAILED, f"{model}: {cause}", model=model, cause=cause)


def read_json(file: Path, default: Any) -> Any:
    """Content of a JSON file; `default` where there is none or it can't be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return default


def _read_config(path: Path, shown: str) -> dict[str, Any]:
    config = read_json(path / "config.json", None)
    if not isinstance(config, dict):
        raise load_failed(shown, "config.json is not a JSON object")
    if "model_type" not in config:
        raise load_failed(shown, "config.json names no model_type")
    if "model_file" in config:
        raise load_failed(shown, f"config.json asks to run the model's own code ({config['model_file']}); refused")
    return config


def _find_shards(path: Path, shown: str) -> tuple[Path, ...]:
    index = read_json(path / "model.safetensors.index.json", {})
    named = set(index.get("weight_map", {}).values())
    missing = sorted(name for name in named if not (path / name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise load_failed(shown, f"shard {missing[0]}{more} is named in model.safetensors.index.json but missing")
    shards = tuple(sorted(path.glob("model*.safetensors")))
    if not shards:
        raise load_failed(shown, "it has no model*.safetensors")
    return shards


def _check_shard(shard: Path, shown: str) -> int:
    """Bytes of the shard's tensors. Raises when the file is shorter or longer than its header says."""
    size = shard.stat().st_size
    try:
        with shard.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        end = max((int(stop) for _, stop in spans), default=0)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise load_failed(shown, f"shard {shard.name} is not a safetensors file") from error
    if 8 + length + end != size:
        raise load_failed(
            shown, f"shard {shard.name} is cut off: {size} bytes where its header says {8 + length + end}"
        )
    return end


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
