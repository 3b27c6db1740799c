"""Adapter folders: `adapter_config.json` beside mlx-lm's `adapters.safetensors`, PEFT's weights, or both.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_daemon.distill.peft import BLOCK_LAYER, PEFT_WEIGHTS, mlx_name, mlx_settings
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import ModelFolder, TensorHeader, read_header

if TYPE_CHECKING:
    from opd_daemon.config import LoraConfig

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, PEFT_WEIGHTS, CARD)
LEAVES = ("lora_a", "lora_b", "m")
IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says. num_layers −1 adapts every block; keys None every linear layer in them."""

    fine_tune_type: str
    num_layers: int
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...] | None
    model: str = ""

    @property
    def dora(self) -> bool:
        """Whether a magnitude per output is trained beside the low-rank product."""
        return self.fine_tune_type == "dora"

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """The settings in mlx-lm's form."""
        settings: dict[str, Any] = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        if self.keys is not None:
            settings["keys"] = list(self.keys)
        return settings

    def to_json(self, also: Mapping[str, Any] | None = None) -> str:
        """The file's content, with settings for others beside mlx-lm's, which passes over what it doesn't know."""
        content = {
            **(also or {}),
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": self.lora_parameters,
            "model": self.model,
        }
        return json.dumps(content, indent=2) + "\n"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`, mlx-lm's or PEFT's.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming the file and what is wrong with it.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "peft_type" in content and "lora_parameters" not in content:
            content = mlx_settings(content, _peft_names(folder), path)
        return _config(content, path)
    except FileNotFoundError:
        cure = "an adapter folder has adapter_config.json and its weights"
        raise _unfit(path, f"no such file; {cure}") from None
    except KeyError as fault:
        raise _unfit(path, f"has no {fault.args[0]!r}, which mlx-lm needs") from None
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise _unfit(path, f"can't be read: {fault}") from None


def _config(content: dict[str, Any], path: Path) -> AdapterConfig:
    kind = content.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise _unfit(path, f"fine_tune_type is {kind!r}; a LoRA or DoRA adapter is needed")
    settings = content["lora_parameters"]
    keys = settings.get("keys")
    return AdapterConfig(
        fine_tune_type=kind,
        num_layers=int(content["num_layers"]),
        rank=int(settings["rank"]),
        scale=float(settings["scale"]),
        dropout=float(settings.get("dropout", 0.0)),
        keys=None if keys is None else tuple(str(key) for key in keys),
        model=str(content.get("model", "")),
    )


def weights_file(folder: Path) -> Path:
    """The file with an adapter's tensors: mlx-lm's, else PEFT's."""
    peft = folder / PEFT_WEIGHTS
    return peft if peft.is_file() and not (folder / WEIGHTS).exists() else folder / WEIGHTS


def adapter_files(folder: Path) -> list[Path]:
    """The files an adapter consists of, as far as the folder has them: for mlx-lm, for PEFT, and the model card."""
    return [path for name in FILES if (path := folder / name).is_file()]


def adapter_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors, by mlx-lm's names and as it holds them; from the header alone.

    Raises:
        OpdError: INVALID_RUN_CONFIG for a tensor that mlx-lm has no place for, MODEL_NOT_FOUND for a broken file.
    """
    header = read_header(file)
    if file.name == WEIGHTS:
        return {name: tensor.shape for name, tensor in header.items()}
    shapes = {}
    for name, tensor in header.items():
        if (own := mlx_name(name)) is None:
            raise _unfit(file, f"{name} is no tensor of a LoRA or DoRA adapter; mlx-lm has no place for it")
        shapes[own] = tensor.shape[::-1]
    return shapes


def adapter_faults(folder: Path, base: dict[str, TensorHeader], bits: int) -> list[str]:
    """What keeps the adapter in `folder` from fitting a base model with these tensors; judged from headers alone."""
    try:
        config = read_adapter_config(folder)
        file = weights_file(folder)
        shapes = adapter_shapes(file)
    except OpdError as fault:
        return [fault.message]
    if config.dora and (problem := dora_fault(bits)):
        return [f"{folder}: {problem}"]
    faults = (_tensor_fault(name, shape, base, config.rank, bits) for name, shape in sorted(shapes.items()))
    if problem := next(filter(None, faults), ""):
        return [f"{file}: {problem}"]
    if problem := _outside(shapes, base, config.num_layers):
        return [f"{file}: {problem}"]
    if lacking := _incomplete(shapes, dora=config.dora):
        return [f"{file}: {lacking} is missing; copy the file again"]
    return [] if shapes else [f"{file}: holds no tensors"]


def _tensor_fault(name: str, shape: tuple[int, ...], base: dict[str, TensorHeader], rank: int, bits: int) -> str:
    layer, _, leaf = name.rpartition(".")
    if leaf not in LEAVES:
        return f"{name} is no adapter tensor"
    if (weight := base.get(f"{layer}.weight")) is None:
        return f"{name} has no layer {layer} in the base model to go with"
    if not IN_A_BLOCK.search(layer):
        return f"{name} is outside the model's blocks; only layers inside them can be trained"
    if (wanted := _expected_shape(leaf, weight, rank, bits)) and shape != wanted:
        return f"{name} has shape {shape}, the base model needs {wanted}"
    return ""


def _outside(shapes: Iterable[str], base: Iterable[str], num_layers: int) -> str:
    """Which adapted block is none of the last ones; empty where all are."""
    first = min(_blocks(shapes), default=0)
    count = max(_blocks(base), default=-1) + 1
    if num_layers <= 0 or first >= count - num_layers:
        return ""
    return f"adapts block {first} of {count} with num_layers {num_layers}; mlx-lm can adapt only a model's last blocks"


def _blocks(names: Iterable[str]) -> set[int]:
    """Numbers of the blocks that tensors belong to."""
    return {int(match[1]) for name in names if (match := BLOCK_LAYER.search(name))}


def lora_faults(lora: LoraConfig, base: ModelFolder) -> Iterator[tuple[str, str]]:
    """Settings of a fresh adapter that a base model can't have: names of fields, and why."""
    if lora.dora and (fault := dora_fault(base.bits)):
        yield "dora", fault
    found = {
        match[2].removesuffix(".weight")
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) > 1 and (match := BLOCK_LAYER.search(name))
    }
    if unknown := sorted(set(lora.keys or ()) - found) if found else []:
        yield "keys", f"{unknown[0]} is no layer inside the model's blocks; they have {', '.join(sorted(found)[:8])}"


def dora_fault(bits: int) -> str:
    """Why DoRA can't be put on a base of so many bits; empty where it can."""
    if bits and 32 % bits:
        return f"mlx-lm can't put DoRA on a {bits}-bit base; use LoRA, or a base of 2, 4 or 8 bits"
    return ""


def _peft_names(folder: Path) -> list[str]:
    return list(adapter_shapes(folder / PEFT_WEIGHTS))


def _incomplete(tensors: dict[str, tuple[int, ...]], *, dora: bool) -> str:
    """The first tensor that an adapted layer should have besides the others; empty where nothing is missing."""
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    wanted = LEAVES if dora else LEAVES[:2]
    names = (f"{layer}.{leaf}" for layer in layers for leaf in wanted)
    return next((name for name in names if name not in tensors), "")


def _expected_shape(leaf: str, weight: TensorHeader, rank: int, bits: int) -> tuple[int, ...] | None:
    if len(weight.shape) != 2:
        return None
    outputs, inputs = weight.shape
    if leaf == "m":
        return (outputs,)
    if weight.dtype == "U32":
        inputs = inputs * 32 // bits if bits else 0
    if not inputs:
        return None
    return (inputs, rank) if leaf == "lora_a" else (rank, outputs)


def _unfit(path: Path, problem: str) -> OpdError:
    return OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: {problem}", path=path)
