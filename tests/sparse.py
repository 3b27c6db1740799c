"""Model folders of true size that take no space: real configurations and headers, weights that are a hole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.tiny import END, tiny_tokenizer, write_json, write_tokenizer

GROUP = 64


def write_sparse_model(
    path: Path,
    *,
    layers: int,
    hidden: int,
    inner: int,
    heads: int = 40,
    kv_heads: int = 8,
    vocab: int = 152_064,
    bits: int = 0,
) -> Path:
    """Write a Qwen2 folder with an untied head, in bfloat16 or quantised; the weights are a hole in a sparse file."""
    path.mkdir(parents=True, exist_ok=True)
    head_dim = hidden // heads
    config: dict[str, Any] = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": tiny_tokenizer().token_to_id(END),
    }
    if bits:
        config["quantization"] = {"group_size": GROUP, "bits": bits}
    write_json(path / "config.json", config)
    write_tokenizer(path, tiny_tokenizer(), 32_768)
    matrices = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    vectors = {"model.norm.weight": hidden}
    attention = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", heads * head_dim, hidden),
            ("self_attn.k_proj", kv_heads * head_dim, hidden),
            ("self_attn.v_proj", kv_heads * head_dim, hidden),
            ("self_attn.o_proj", hidden, heads * head_dim),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            matrices[f"{block}.{name}"] = (rows, columns)
        vectors |= {f"{block}.input_layernorm.weight": hidden, f"{block}.post_attention_layernorm.weight": hidden}
        vectors |= {f"{block}.self_attn.{name}.bias": size for name, size in attention.items()}
    tensors: dict[str, tuple[str, list[int], int]] = {name: ("BF16", [size], 2) for name, size in vectors.items()}
    for name, (rows, columns) in matrices.items():
        if not bits:
            tensors[f"{name}.weight"] = ("BF16", [rows, columns], 2)
            continue
        tensors[f"{name}.weight"] = ("U32", [rows, columns * bits // 32], 4)
        for leaf in ("scales", "biases"):
            tensors[f"{name}.{leaf}"] = ("BF16", [rows, columns // GROUP], 2)
    _write_header(path / "model.safetensors", tensors)
    return path


def _write_header(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    place, entries = 0, {}
    for name, (dtype, shape, value_bytes) in tensors.items():
        size = value_bytes
        for side in shape:
            size *= side
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + place)
