"""Tiny Qwen2 model folders with random weights: real files, real tokenizer, milliseconds to build and to run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from opd_daemon import blas

blas.preload()

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.qwen2 import Model, ModelArgs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)

# transformers rebuilds a Qwen2 tokenizer with this pattern whatever tokenizer.json says, so the file says the same.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TRAINING_TEXT = """
The tide comes in twice a day, and twice a day it leaves the harbour to the gulls. A baker who rises at four knows the
street before it has a voice. Water boils at a lower temperature on a mountain because the air above it weighs less.
Could you explain why the sky is blue? Please write a short letter to a friend who has moved to another town.
def add(first, second): return first + second. The answer is 42, and 7 times 6 is also 42. List three fruits: apples,
pears and plums. user assistant system. What is the capital of a country? It is the city where its government meets.
To learn a language, speak it every day; to learn a teacher's language, listen to every word and its probability.
""".strip()


def write_tiny_qwen2(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 512,
    vocab: int | None = None,
    tie_word_embeddings: bool = True,
    extra_tokens: Sequence[str] = (),
    shuffled_vocab: bool = False,
) -> Path:
    """Write a random float32 Qwen2 folder that `mlx_lm.load(str(path))` takes, and return its path.

    vocab is the width of the logits; by default it is wider than the tokenizer and no multiple of 256, as in real
    Qwen2 models. extra_tokens follow the special tokens (a superset vocabulary). shuffled_vocab gives most ordinary
    tokens other ids (a tokenizer that disagrees). The same arguments write the same bytes.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(tuple(extra_tokens), shuffled=shuffled_vocab)
    size = tokenizer.get_vocab_size()
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": hidden * 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab or default_width(size),
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": "float32",
        "eos_token_id": tokenizer.token_to_id(END),
    }
    write_json(path / "config.json", config)
    eos_ids = [tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)]
    write_json(path / "generation_config.json", {"eos_token_id": eos_ids, "pad_token_id": eos_ids[1]})
    write_tokenizer(path, tokenizer, context)
    write_random_weights(path, config, seed)
    return path


def default_width(size: int) -> int:
    """The next multiple of 64 above the tokenizer, plus 128, so that some ids belong to no token."""
    return (size // 64 + 3) * 64


@cache
def tiny_tokenizer(extra_tokens: tuple[str, ...] = (), *, shuffled: bool = False) -> Tokenizer:
    """A byte-level BPE of about 400 tokens: every text encodes and decodes without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    if shuffled:
        tokenizer.model = shuffle_ids(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(extra_tokens))
    return tokenizer


def shuffle_ids(tokenizer: Tokenizer) -> models.BPE:
    """The same tokens and merges under other ids."""
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    random.Random(1).shuffle(tokens)
    return models.BPE({token: index for index, token in enumerate(tokens)}, [tuple(pair) for pair in trained["merges"]])


def write_tokenizer(path: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(path / "tokenizer_config.json", settings)


def write_random_weights(path: Path, config: dict[str, object], seed: int) -> None:
    """Write model.safetensors: normal weights, wide enough that the distributions are far from uniform."""
    model = Model(ModelArgs.from_dict(config))
    names = sorted((name, value.shape) for name, value in tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(seed), len(names))
    weights = {name: random_weight(name, shape, keys[index]) for index, (name, shape) in enumerate(names)}
    model.update(tree_unflatten(list(weights.items())))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})


def random_weight(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    """One float32 tensor: norms near one, embeddings and head sharp, everything else keeping the signal's size."""
    noise = mx.random.normal(shape, key=key)
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    sharpness = 2.0 if "embed_tokens" in name or "lm_head" in name else 1.0
    return sharpness * noise / shape[-1] ** 0.5


def write_json(path: Path, content: object) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tiny_adapter(path: Path, base: Path, *, seed: int = 0, size: float = 0.02, rank: int = 4) -> Path:
    """Write an mlx-lm LoRA adapter for `base` with random weights of the given size, and return its folder."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    model.freeze()
    settings = {"rank": rank, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), settings)
    shapes = sorted((name, value.shape) for name, value in tree_flatten(model.trainable_parameters()))
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {name: size * mx.random.normal(shape, key=key) for (name, shape), key in zip(shapes, keys, strict=True)}
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / "adapters.safetensors"), weights, metadata={"format": "mlx"})
    content = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": settings}
    write_json(path / "adapter_config.json", content)
    return path
