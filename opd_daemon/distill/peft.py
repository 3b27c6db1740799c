"""Adapters in the form of PEFT, the adapter library of transformers: names, settings and what of it mlx-lm can hold.

PEFT's `lora_A.weight` is `(rank, inputs)` where mlx-lm's `lora_a` is `(inputs, rank)`, and so for the other matrix;
its `lora_alpha` is scale · rank. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opd_daemon.errors import OpdError, Reason

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
BLOCK_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")

# Settings that change what an adapter computes in ways mlx-lm has no place for; each is off when empty or missing.
FOREIGN = (
    "alpha_pattern",
    "rank_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
)


def peft_name(name: str) -> str:
    """PEFT's name of a tensor of mlx-lm's: `model.layers.0.self_attn.q_proj.lora_a` and so on."""
    layer, _, leaf = name.rpartition(".")
    return f"{PREFIX}{layer}.{LEAVES[leaf]}"


def mlx_name(name: str) -> str | None:
    """mlx-lm's name of a tensor of PEFT's; None for one that mlx-lm has no place for."""
    bare = name.removeprefix(PREFIX)
    for leaf, suffix in LEAVES.items():
        if bare.removesuffix(".weight").endswith(f".{suffix.removesuffix('.weight')}"):
            return f"{bare.removesuffix('.weight').removesuffix(suffix.removesuffix('.weight'))}{leaf}"
    return None


def peft_settings(*, rank: int, scale: float, dropout: float, dora: bool, base: str, names: Iterable[str]) -> Any:
    """PEFT's settings of an adapter whose tensors have these names of mlx-lm's."""
    layers, keys = _places(names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": keys,
        "layers_to_transform": layers,
        "use_dora": dora,
        "bias": "none",
        "inference_mode": True,
    }


def mlx_settings(settings: Mapping[str, Any], names: Iterable[str], path: Path) -> dict[str, Any]:
    """mlx-lm's settings of an adapter with PEFT's settings, and tensors of these names of mlx-lm's.

    Raises:
        OpdError: INVALID_RUN_CONFIG where mlx-lm can't hold such an adapter.
    """
    if settings.get("peft_type") != "LORA":
        raise _unfit(path, f"peft_type is {settings.get('peft_type')!r}; a LoRA or DoRA adapter is needed")
    foreign = [name for name in FOREIGN if settings.get(name)]
    if foreign or settings.get("bias", "none") != "none":
        raise _unfit(path, f"{(*foreign, 'bias')[0]} is set, which mlx-lm's adapters can't express; train one without")
    layers, keys = _places(names)
    if not layers:
        raise _unfit(path, "adapts no block of a model")
    if layers != list(range(layers[0], layers[-1] + 1)):
        raise _unfit(path, f"adapts blocks {_listed(layers)}; mlx-lm can adapt only a model's last ones, without gaps")
    rank = int(settings["r"])
    scale = float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)
    return {
        "fine_tune_type": "dora" if settings.get("use_dora") else "lora",
        "num_layers": len(layers),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": float(settings.get("lora_dropout", 0.0)),
            "keys": keys,
        },
        "model": str(settings.get("base_model_name_or_path") or ""),
    }


def _places(names: Iterable[str]) -> tuple[list[int], list[str]]:
    """Numbers of the blocks, and names inside a block of the layers, that tensors belong to."""
    found = [match for name in names if (match := BLOCK_LAYER.search(name.rpartition(".")[0]))]
    return sorted({int(match[1]) for match in found}), sorted({match[2] for match in found})


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown if len(numbers) <= 6 else f"{shown}, …"


def _unfit(path: Path, problem: str) -> OpdError:
    return OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: {problem}", path=path)
