"""Tiny random models of several families, by what they do to their logits behind the output head."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx import nn

VOCAB = 96
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
GRANITE = {
    "logits_scaling": 6.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.3,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}
MINICPM = {"dim_model_base": 12, "scale_depth": 1.4, "scale_emb": 12.0, "num_key_value_heads": 2}
NANOCHAT = {"num_key_value_heads": 2, "rope_theta": 10000.0}
LFM2 = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
# Family: its settings, and what its logits go through: (factor, soft cap).
FAMILIES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "llama": ({"tie_word_embeddings": False}, (1.0, 0.0)),
    "qwen2": ({"tie_word_embeddings": True}, (1.0, 0.0)),
    "qwen3": ({"tie_word_embeddings": True, "rope_theta": 10000.0}, (1.0, 0.0)),
    "gemma2": ({"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}, (1.0, 3.0)),
    "cohere": ({"logit_scale": 0.3}, (0.3, 0.0)),
    "granite": (GRANITE | {"tie_word_embeddings": False}, (1 / 6, 0.0)),
    "minicpm": (MINICPM | {"tie_word_embeddings": False}, (12 / 32, 0.0)),
    "nanochat": (NANOCHAT, (1.0, 15.0)),
    "gemma3_text": ({"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}, (1.0, 0.0)),
    "lfm2": (LFM2, (1.0, 0.0)),
}
# Not to be split: its body gives the logits.
FAMILIES_RUN_WHOLE = {"gpt_neox": ({"rotary_emb_base": 10000, "rotary_pct": 0.25}, (1.0, 0.0))}


def family_config(name: str, **settings: Any) -> dict[str, Any]:
    """What `config.json` says of a tiny model of one family."""
    return {"model_type": name, **COMMON, **(FAMILIES | FAMILIES_RUN_WHOLE)[name][0], **settings}


def tiny_family(name: str, *, quantised: bool = False, seed: int = 0, **settings: Any) -> Any:
    """A model of one family with random weights."""
    family = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = family.Model(family.ModelArgs.from_dict(family_config(name, **settings)))
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model
