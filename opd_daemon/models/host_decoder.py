"""One decoding step in numpy where MLX runs on a CPU.

A step multiplies every weight with a few rows, so what counts is how fast a BLAS gets through the weights. With the
weights as the left factor, and without a dispatch for each of the 900 small operations of a 30-layer model with an
adapter, numpy takes about half the time MLX takes. Keys and values stay in mlx-lm's own caches.

What a model computes is not asked of its class but proved on a probe; one that computes anything else runs on MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.models.host import swiglu
from opd_daemon.models.split import OutputHead, SplitModel

Array = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Decoder = Callable[[mx.array, Sequence[Any]], mx.array]

# From here on MLX's products are as fast.
MOST_ROWS = 64
PROBE = ((5, 11, 3, 17), (7, 2))
PROBE_STEPS = 2
TOLERANCE = 1e-4
FAULTS = (AttributeError, KeyError, TypeError, ValueError, IndexError)


def decoder_of(model: Any, parts: SplitModel) -> Decoder:
    """What decodes: tokens (B, 1) and caches to logits (B, 1, V). Where nothing is faster, the model itself.

    Tokens (B, T) with T > 1, more rows than pay, and caches of other kinds go through the model too.
    """

    def plain(tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        logits: mx.array = parts.head(parts.body(tokens, cache))
        return logits

    if mx.default_device() != mx.Device(mx.cpu) or parts.refusal or parts.dtype != mx.float32:
        return plain
    try:
        decoder = HostDecoder(model, parts, plain)
        return decoder if _proved(decoder, model, plain) else plain
    except FAULTS:
        return plain


class HostDecoder:
    """A float32 model of Llama's kind, which Qwen's is too: RMS norms, rotary positions, SwiGLU; with or without LoRA.

    Weights are read where the model holds them, at every step, so an updated adapter counts at once.
    """

    def __init__(self, model: Any, parts: SplitModel, plain: Decoder) -> None:
        outer = getattr(model, "language_model", model)
        self._embedding, self._norm = outer.model.embed_tokens, outer.model.norm
        rotary = _Rotary(model.layers[0].self_attn.rope)
        self._layers = tuple(_Layer(layer, rotary) for layer in model.layers)
        self._head: Any = parts.head
        self._plain = plain
        self._caches = _cache_kinds()
        if not isinstance(parts.head, OutputHead) or type(self._embedding) is not nn.Embedding:
            raise TypeError("its embedding or its head is of another kind")
        if any(type(entry) is not self._caches[0] for entry in _new_cache(model)):
            raise TypeError("it keeps something else than keys and values, or not all of them")

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits (B, T, V) of tokens (B, T)."""
        rows, length = tokens.shape
        if length != 1 or rows > MOST_ROWS or not all(type(entry) in self._caches for entry in cache):
            return self._plain(tokens, cache)
        states = np.ascontiguousarray(_view(self._embedding.weight)[np.asarray(tokens)[:, 0]].T)
        places = np.broadcast_to(np.asarray(cache[0].offset), (rows,)).astype(np.int64)
        padding = np.asarray(cache[0].left_padding) if hasattr(cache[0], "left_padding") else None
        for layer, entry in zip(self._layers, cache, strict=True):
            states = layer.step(states, entry, places, padding)
        return self._logits(_normed(states, self._norm))[:, None]

    def _logits(self, states: Array) -> mx.array:
        layer = self._head.layer
        if type(layer) not in {nn.Linear, nn.Embedding} or "bias" in layer or not self._head.plain:
            logits: mx.array = self._head(mx.array(np.ascontiguousarray(states.T)))
            return logits
        return mx.array(np.ascontiguousarray((_view(layer.weight) @ states).T))


class _Layer:
    """One block of the model. States are columns, (D, B): so every product has the weights on its left."""

    def __init__(self, block: Any, rotary: _Rotary) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._norms = block.input_layernorm, block.post_attention_layernorm
        self._queries, self._keys, self._values, self._out = (
            _Product(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self._head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._heads, self._pairs = attention.n_heads, attention.n_kv_heads
        self._scale = np.float32(attention.scale)
        self._rotary = rotary
        self._gate, self._up, self._down = (_Product(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def step(self, states: Array, cache: Any, places: Places, padding: Places | None) -> Array:
        """States (D, B) of tokens at `places` (B,) behind the block; their keys and values join the cache."""
        states = states + self._attend(_normed(states, self._norms[0]), cache, places, padding)
        normed = _normed(states, self._norms[1])
        gates = self._gate(normed)
        swiglu(gates, self._up(normed), gates)
        states += self._down(gates)
        return states

    def _attend(self, normed: Array, cache: Any, places: Places, padding: Places | None) -> Array:
        rows = normed.shape[1]
        queries = self._turned(self._queries(normed), self._heads, self._head_norms[0], places)
        keys = self._turned(self._keys(normed), self._pairs, self._head_norms[1], places)
        values = self._values(normed).T.reshape(rows, self._pairs, -1)
        seen = cache.update_and_fetch(*(mx.array(np.ascontiguousarray(part[:, :, None])) for part in (keys, values)))
        known, said = (_view(part) for part in seen)
        scores = queries.reshape(rows, self._pairs, -1, queries.shape[-1]) @ known.swapaxes(-1, -2)
        scores *= self._scale
        if padding is not None and padding.any():
            hidden = np.arange(known.shape[2]) < padding[:, None]
            scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return self._out(np.ascontiguousarray((scores @ said).reshape(rows, -1).T))

    def _turned(self, columns: Array, heads: int, norm: Any, places: Places) -> Array:
        """Columns (H·D, B) as vectors (B, H, D), normed where the model does that, turned to their places."""
        parted = columns.reshape(heads, -1, columns.shape[1])
        if norm is not None:
            parted = _normed(parted, norm)
        return self._rotary.turn(np.ascontiguousarray(parted.transpose(2, 0, 1)), places)


class _Rotary:
    """Rotations by position, read off the model's own module: what it makes of (1, 0) is (cos, sin)."""

    def __init__(self, rope: Any) -> None:
        self._rope = rope
        self._cosines: Array = np.zeros((0, 0), np.float32)
        self._sines = self._cosines

    def turn(self, vectors: Array, places: Places) -> Array:
        """Vectors (B, H, D) of positions (B,), turned."""
        half = vectors.shape[-1] // 2
        if len(self._cosines) <= places.max():
            self._extend(2 * int(places.max()) + 64, half)
        cosines, sines = self._cosines[places, None], self._sines[places, None]
        first, second = vectors[..., :half], vectors[..., half:]
        return np.concatenate([first * cosines - second * sines, first * sines + second * cosines], axis=-1)

    def _extend(self, length: int, half: int) -> None:
        unit = mx.concatenate([mx.ones((1, 1, length, half)), mx.zeros((1, 1, length, half))], axis=-1)
        turned = np.array(self._rope(unit))[0, 0]
        self._cosines, self._sines = turned[:, :half], turned[:, half:]


class _Product:
    """A linear layer, with a LoRA on it or without."""

    def __init__(self, layer: Any) -> None:
        self._lora = layer if "lora_a" in layer and "m" not in layer else None
        self._linear = layer if self._lora is None else layer.linear
        if type(self._linear) is not nn.Linear:
            raise TypeError("a layer is of another kind")

    def __call__(self, states: Array) -> Array:
        """What it makes of states (D, B)."""
        result: Array = _view(self._linear.weight) @ states
        if self._lora is not None:
            narrow = _view(self._lora.lora_a).T @ states
            narrow *= np.float32(self._lora.scale)
            result += _view(self._lora.lora_b).T @ narrow
        if "bias" in self._linear:
            result += _view(self._linear.bias)[:, None]
        return result


def _normed(states: Array, norm: Any) -> Array:
    """RMS norm of columns (…, D, B)."""
    scale = np.square(states).mean(axis=-2, keepdims=True)
    scale += np.float32(norm.eps)
    np.sqrt(scale, out=scale)
    result: Array = states / scale
    result *= _view(norm.weight)[:, None]
    return result


def _view(array: mx.array) -> Array:
    """The array's own memory."""
    view: Array = np.asarray(array)
    return view


def _cache_kinds() -> tuple[type[Any], type[Any]]:
    """Caches of one sequence and of several; imported late, as mlx-lm changes a process that imports it."""
    from mlx_lm.models.cache import BatchKVCache, KVCache

    return KVCache, BatchKVCache


def _new_cache(model: Any) -> Sequence[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    cache: Sequence[Any] = make_prompt_cache(model)
    return cache


def _proved(decoder: HostDecoder, model: Any, plain: Decoder) -> bool:
    """Whether a few steps of sequences of unlike lengths give what the model gives."""
    for prompts in (PROBE, PROBE[:1]):
        found, expected = (_probed(step, model, plain, prompts) for step in (decoder, plain))
        if not bool(mx.abs(found - expected).max() <= TOLERANCE * mx.abs(expected).max()):
            return False
    return True


def _probed(step: Decoder, model: Any, plain: Decoder, prompts: Sequence[tuple[int, ...]]) -> mx.array:
    _, batched = _cache_kinds()
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = _new_cache(model) if len(prompts) == 1 else [batched(padding) for _ in model.layers]
    tokens = mx.array([[0] * lacking + [*prompt] for lacking, prompt in zip(padding, prompts, strict=True)])
    mx.eval(plain(tokens, cache))
    steps = [step(mx.full((len(prompts), 1), 1 + count, dtype=mx.int32), cache) for count in range(PROBE_STEPS)]
    return mx.concatenate(steps, axis=1)
