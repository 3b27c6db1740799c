"""The sizes of a decoder that decide what it costs, read from its folder; and those of an adapter on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from opd_daemon.config import LoraConfig
from opd_daemon.distill.adapter import weights_file
from opd_daemon.models.folder import ModelFolder, TensorHeader, read_header

BLOCK_TENSOR = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
VALUE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of a block. layer: its name inside the block; copies: experts that share the name."""

    layer: str
    outputs: int
    inputs: int
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model.

    inner: width of the feed-forward part. width: number of logits. block_parameters: of one block, only those a token
    uses where experts share the work. block_bytes, head_bytes: stored; rest_bytes: all other tensors. value_bytes: of
    one number in the activations, and in weights that aren't quantised.
    """

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    bits: int
    value_bytes: int
    block_parameters: float
    block_bytes: int
    head_bytes: int
    rest_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All of it."""
        return self.layers * self.block_bytes + self.head_bytes + self.rest_bytes

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.width * self.hidden

    @property
    def parameters(self) -> float:
        """Weights a token's forward multiplies with, the head's included."""
        return self.layers * self.block_parameters + self.head_parameters

    def kv_bytes(self, layers: int | None = None) -> int:
        """Keys and values of one token."""
        count = self.layers if layers is None else layers
        return 2 * count * self.kv_heads * self.head_dim * self.value_bytes


def shape_of(folder: ModelFolder) -> Shape:
    """Measure a model folder."""
    blocks = _blocks(folder)
    layers = len(blocks) or folder.number("num_hidden_layers", 1)
    block_bytes = sum(tensor.bytes for block in blocks.values() for tensor in block.values()) // layers
    head_bytes = sum(tensor.bytes for tensor in _head(folder).values())
    hidden, heads = folder.number("hidden_size", 1), folder.number("num_attention_heads", 1)
    return Shape(
        architecture=str(folder.config["model_type"]),
        layers=layers,
        hidden=hidden,
        inner=_inner(folder, hidden),
        heads=heads,
        kv_heads=folder.number("num_key_value_heads", heads),
        head_dim=folder.number("head_dim", hidden // heads or 1),
        width=folder.number("vocab_size", 1),
        bits=folder.bits,
        value_bytes=_value_bytes(folder),
        block_parameters=_used_parameters(folder, blocks) / layers,
        block_bytes=block_bytes,
        head_bytes=head_bytes,
        rest_bytes=folder.weight_bytes - layers * block_bytes - head_bytes,
    )


def in_float32(folder: ModelFolder) -> ModelFolder:
    """The same model with every tensor that isn't quantised cast to float32."""
    tensors = {
        name: tensor
        if tensor.dtype not in VALUE_BYTES
        else TensorHeader("F32", tensor.shape, 4 * tensor.bytes // VALUE_BYTES[tensor.dtype])
        for name, tensor in folder.tensors.items()
    }
    return replace(folder, tensors=tensors)


def linears(folder: ModelFolder) -> list[list[Linear]]:
    """The matrices of every block, in order of the blocks."""
    return [list(_linears_in(block, folder)) for _, block in sorted(_blocks(folder).items())]


def adapter_parameters(folder: ModelFolder, lora: LoraConfig) -> int:
    """Weights of a fresh adapter."""
    blocks = linears(folder)
    adapted = blocks if lora.num_layers <= 0 else blocks[-lora.num_layers :]
    chosen = [entry for block in adapted for entry in block if lora.keys is None or entry.layer in lora.keys]
    return sum(
        entry.copies * (lora.rank * (entry.inputs + entry.outputs) + (entry.outputs if lora.dora else 0))
        for entry in chosen
    )


def stored_parameters(adapter: Path) -> int:
    """Weights of the adapter in a folder, which may hold it twice, or optimizer state besides. Raises FolderFault."""
    return sum(math.prod(tensor.shape) for tensor in read_header(weights_file(adapter)).values())


def _head(folder: ModelFolder) -> dict[str, TensorHeader]:
    """Tensors of the output head; a tied model's embedding is its head."""
    found = {name: tensor for name, tensor in folder.tensors.items() if "lm_head." in name}
    return found or {name: tensor for name, tensor in folder.tensors.items() if "embed_tokens." in name}


def _blocks(folder: ModelFolder) -> dict[int, dict[str, TensorHeader]]:
    blocks: dict[int, dict[str, TensorHeader]] = {}
    for name, tensor in folder.tensors.items():
        if found := BLOCK_TENSOR.search(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
    return blocks


def _linears_in(block: dict[str, TensorHeader], folder: ModelFolder) -> Iterator[Linear]:
    for name, tensor in block.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(tensor.shape) in (2, 3):
            *copies, outputs, inputs = tensor.shape
            if tensor.dtype == "U32":
                scales = block.get(f"{layer}.scales")
                inputs = scales.shape[-1] * _group_size(folder) if scales else inputs * 32 // (folder.bits or 32)
            yield Linear(layer, outputs, inputs, math.prod(copies))


def _group_size(folder: ModelFolder) -> int:
    settings = folder.config.get("quantization") or folder.config.get("quantization_config") or {}
    return int(settings.get("group_size", 64))


def _used_parameters(folder: ModelFolder, blocks: dict[int, dict[str, TensorHeader]]) -> float:
    experts = max(folder.number("num_experts"), folder.number("num_local_experts"), folder.number("n_routed_experts"))
    share = folder.number("num_experts_per_tok", experts) / experts if experts else 1.0
    return sum(
        entry.outputs * entry.inputs * entry.copies * (share if entry.copies > 1 else 1.0)
        for block in blocks.values()
        for entry in _linears_in(block, folder)
    )


def _inner(folder: ModelFolder, hidden: int) -> int:
    inner = folder.number("intermediate_size", 4 * hidden)
    if active := folder.number("num_experts_per_tok"):
        return folder.number("moe_intermediate_size", inner) * active
    return inner


def _value_bytes(folder: ModelFolder) -> int:
    """Of the norms, whose type the activations have."""
    found = [VALUE_BYTES[tensor.dtype] for tensor in folder.tensors.values() if tensor.dtype in VALUE_BYTES]
    return min(found, default=4)
