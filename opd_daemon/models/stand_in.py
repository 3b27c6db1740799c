"""A model folder with another's shapes, fewer layers and random weights: layer by layer it costs the same."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.models.folder import ModelFolder, TensorHeader

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
# Files that don't belong to the weights are copied up to this size.
LARGEST_FILE = 64 << 20
NOISE_VALUES = 1 << 20
# Enough that no distribution is uniform, little enough that nothing overflows; quantised weights are 15 times a scale.
NOISE, SCALE_NOISE = 0.05, 0.004


def write_stand_in(folder: ModelFolder, out: Path, layers: int) -> Path:
    """Write the stand-in of a folder with its first `layers` layers to `out`, and return that path."""
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.path.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if file.is_file() and not weights and file.stat().st_size <= LARGEST_FILE:
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(_shortened(folder.config, layers)), encoding="utf-8")
    kept = {
        name: tensor
        for name, tensor in folder.tensors.items()
        if (found := LAYER.search(name)) is None or int(found[1]) < layers
    }
    _write_tensors(out / "model.safetensors", kept)
    return out


def _shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A configuration for so many layers; lists with an entry a layer are cut."""
    whole = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)
    shorter: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name == "text_config":
            shorter[name] = _shortened(value, layers)
        elif name in LAYER_COUNTS:
            shorter[name] = layers
        elif isinstance(value, list) and len(value) == whole:
            shorter[name] = value[:layers]
        else:
            shorter[name] = value
    return shorter


def _write_tensors(path: Path, tensors: dict[str, TensorHeader]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    place = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.bytes],
        }
        place += tensor.bytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    noise = np.random.default_rng(0).standard_normal(NOISE_VALUES).astype(np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors.items():
            block = _noise(name, tensor, noise).tobytes()
            for start in range(0, tensor.bytes, len(block)):
                file.write(block[: tensor.bytes - start])


def _noise(name: str, tensor: TensorHeader, noise: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Values of a tensor's type: small ones around 0; in norms around 1; whatever in packed integers."""
    values = noise * np.float32(SCALE_NOISE if name.endswith(("scales", "biases")) else NOISE)
    if len(tensor.shape) == 1 and name.endswith("weight"):
        values = values + np.float32(1.0)
    if tensor.dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if tensor.dtype in ("F16", "F64"):
        return values.astype(np.float16 if tensor.dtype == "F16" else np.float64)
    if tensor.dtype == "F32":
        return values
    return np.random.default_rng(1).integers(96, 128, 4 * NOISE_VALUES, dtype=np.uint8)
