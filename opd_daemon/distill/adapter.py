"""Adapter folders as mlx-lm reads them: `adapters.safetensors` beside `adapter_config.json`. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon.distill.model_folder import TensorHeader, read_header
from opd_daemon.errors import OpdError, Reason

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
LEAVES = ("lora_a", "lora_b", "m")


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
    def lora_parameters(self) -> dict[str, Any]:
        """The settings in mlx-lm's form."""
        settings: dict[str, Any] = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        if self.keys is not None:
            settings["keys"] = list(self.keys)
        return settings

    def to_json(self) -> str:
        """The file's content."""
        content = {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": self.lora_parameters,
            "model": self.model,
        }
        return json.dumps(content, indent=2) + "\n"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming the file and what is wrong with it.
    """
    path = folder / CONFIG
    content: dict[str, Any] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("fine_tune_type", "lora")
        settings = content["lora_parameters"] if kind != "full" else {}
        if kind not in ("lora", "dora"):
            raise _unfit(path, f"fine_tune_type is {kind!r}; a LoRA or DoRA adapter is needed")
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
    except FileNotFoundError:
        cure = "an mlx-lm adapter folder has adapter_config.json and adapters.safetensors"
        raise _unfit(path, f"no such file; {cure}") from None
    except KeyError as fault:
        hint = "; PEFT adapters have to be converted first" if "peft_type" in content else ""
        raise _unfit(path, f"has no {fault.args[0]!r}, which mlx-lm needs{hint}") from None
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise _unfit(path, f"can't be read: {fault}") from None


def adapter_faults(folder: Path, base: dict[str, TensorHeader], bits: int) -> list[str]:
    """What keeps the adapter in `folder` from fitting a base model with these tensors; judged from headers alone."""
    try:
        config = read_adapter_config(folder)
        tensors = read_header(folder / WEIGHTS)
    except OpdError as fault:
        return [fault.message]
    for name, tensor in sorted(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            return [f"{folder / WEIGHTS}: {name} is no adapter tensor"]
        weight = base.get(f"{layer}.weight")
        if weight is None:
            return [f"{folder / WEIGHTS}: {name} has no layer {layer} in the base model to go with"]
        if (wanted := _expected_shape(leaf, weight, config.rank, bits)) and tensor.shape != wanted:
            return [f"{folder / WEIGHTS}: {name} has shape {tensor.shape}, the base model needs {wanted}"]
    return [] if tensors else [f"{folder / WEIGHTS}: holds no tensors"]


def _expected_shape(leaf: str, weight: TensorHeader, rank: int, bits: int) -> tuple[int, ...] | None:
    if len(weight.shape) != 2 or leaf == "m":
        return None
    outputs, inputs = weight.shape
    if weight.dtype == "U32":
        inputs = inputs * 32 // bits if bits else 0
    if not inputs:
        return None
    return (inputs, rank) if leaf == "lora_a" else (rank, outputs)


def _unfit(path: Path, problem: str) -> OpdError:
    return OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: {problem}", path=path)
