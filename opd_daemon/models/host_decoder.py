"""One decoding step in numpy where MLX runs on a CPU.

A step multiplies every weight with a few rows, so what counts is how fast a BLAS gets through the weights. With the
weights as the left factor, and without a dispatch for each of the 900 small operations of a 30-layer model with an
adapter, numpy takes about half the time MLX takes. Keys and values stay in mlx-lm's own caches.

What a model computes is not asked of its class but proved on a probe; one that computes anything else runs on MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.models.hands import Hands
from opd_daemon.models.host import swiglu
from opd_daemon.models.split import OutputHead, SplitModel

Array = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Turns = tuple[Array, Array]
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
        hands = Hands()
        self._embedding, self._norm = outer.model.embed_tokens, _Norm(outer.model.norm)
        self._layers = tuple(_Layer(layer, hands) for layer in model.layers)
        self._rotary = _Rotary(model.layers[0].self_attn.rope, self._layers[0].width // 2)
        self._head: Any = parts.head
        self._plain = plain
        self._caches = _cache_kinds()
        if not isinstance(parts.head, OutputHead) or type(self._embedding) is not nn.Embedding:
            raise TypeError("its embedding or its head is of another kind")
        self._products = _Products(hands, parts.head.layer) if _plain_head(parts.head) else None
        if any(type(entry) is not self._caches[0] for entry in _new_cache(model)):
            raise TypeError("it keeps something else than keys and values, or not all of them")

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits (B, T, V) of tokens (B, T)."""
        rows, length = tokens.shape
        if length != 1 or rows > MOST_ROWS or not all(type(entry) in self._caches for entry in cache):
            return self._plain(tokens, cache)
        states = np.ascontiguousarray(_view(self._embedding.weight)[np.asarray(tokens)[:, 0]].T)
        turns = self._rotary.at(np.broadcast_to(np.asarray(cache[0].offset), (rows,)).astype(np.int64))
        padding = np.asarray(cache[0].left_padding) if hasattr(cache[0], "left_padding") else None
        if padding is not None and not padding.any():
            padding = None
        for layer, entry in zip(self._layers, cache, strict=True):
            states = layer.step(states, entry, turns, padding)
        return self._logits(self._norm(states))[:, None]

    def _logits(self, states: Array) -> mx.array:
        if self._products is None:
            logits: mx.array = self._head(mx.array(np.ascontiguousarray(states.T)))
            return logits
        return mx.array(np.ascontiguousarray(self._products(states).T))


class _Layer:
    """One block of the model. States are columns, (D, B): so every product has the weights on its left."""

    def __init__(self, block: Any, hands: Hands) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._norms = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self._inputs = _Products(hands, attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _Products(hands, attention.o_proj)
        self._gate_and_up, self._down = _Products(hands, mlp.gate_proj, mlp.up_proj), _Products(hands, mlp.down_proj)
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._head_norms = tuple(None if norm is None else _Norm(norm) for norm in norms)
        self._heads, self._pairs = attention.n_heads, attention.n_kv_heads
        self._scale = np.float32(attention.scale)
        self.width = self._inputs.sizes[0] // self._heads

    def step(self, states: Array, cache: Any, turns: Turns, padding: Places | None) -> Array:
        """States (D, B) behind the block; keys and values join the cache. turns: of their positions."""
        states = states + self._attend(self._norms[0](states), cache, turns, padding)
        both = self._gate_and_up(self._norms[1](states))
        gates, ups = both[: len(both) // 2], both[len(both) // 2 :]
        swiglu(gates, ups, gates)
        states += self._down(gates)
        return states

    def _attend(self, normed: Array, cache: Any, turns: Turns, padding: Places | None) -> Array:
        rows = normed.shape[1]
        vectors = self._inputs(normed).reshape(-1, self.width, rows)
        turning = self._heads + self._pairs
        queries, keys, values = vectors[: self._heads], vectors[self._heads : turning], vectors[turning:]
        for part, norm in zip((queries, keys), self._head_norms, strict=True):
            if norm is not None:
                part[:] = norm(part)
        _turn(vectors[:turning], turns)
        new = (mx.array(np.ascontiguousarray(part.transpose(2, 0, 1)[:, :, None])) for part in (keys, values))
        known, said = (_view(part) for part in cache.update_and_fetch(*new))
        asked = np.ascontiguousarray(queries.transpose(2, 0, 1)).reshape(rows, self._pairs, -1, self.width)
        scores = asked @ known.swapaxes(-1, -2)
        scores *= self._scale
        if padding is not None:
            hidden = np.arange(known.shape[2]) < padding[:, None]
            scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return self._out(np.ascontiguousarray((scores @ said).reshape(rows, -1).T))


class _Rotary:
    """Rotations by position, read off the model's own module: what it makes of (1, 0) is (cos, sin)."""

    def __init__(self, rope: Any, half: int) -> None:
        self._rope, self._half = rope, half
        self._cosines: Array = np.zeros((0, half), np.float32)
        self._sines = self._cosines

    def at(self, places: Places) -> Turns:
        """Cosines and sines of positions (B,), each (half a head's width, B)."""
        if len(self._cosines) <= places.max():
            self._extend(2 * int(places.max()) + 64)
        return np.ascontiguousarray(self._cosines[places].T), np.ascontiguousarray(self._sines[places].T)

    def _extend(self, length: int) -> None:
        shape = 1, 1, length, self._half
        turned = np.array(self._rope(mx.concatenate([mx.ones(shape), mx.zeros(shape)], axis=-1)))[0, 0]
        self._cosines, self._sines = turned[:, : self._half], turned[:, self._half :]


class _Products:
    """Linear layers of one input, each with a LoRA on it or without.

    sizes: how many outputs each of them has.
    """

    def __init__(self, hands: Hands, *layers: Any) -> None:
        loras = ["lora_a" in layer and "m" not in layer for layer in layers]
        linears = [layer.linear if lora else layer for layer, lora in zip(layers, loras, strict=True)]
        if any(type(linear) not in {nn.Linear, nn.Embedding} for linear in linears):
            raise TypeError("a layer is of another kind")
        self._hands = hands
        self._weights = [_Held(linear, "weight") for linear in linears]
        self._biases = [_Held(linear, "bias") if "bias" in linear else None for linear in linears]
        self.sizes = [linear.weight.shape[0] for linear in linears]
        ends = list(accumulate(self.sizes))
        self._parts = [slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]
        adapted = [(layer, part) for layer, part, lora in zip(layers, self._parts, loras, strict=True) if lora]
        self._adapters = [(_Adapter(layer), part) for layer, part in adapted]

    def __call__(self, states: Array) -> Array:
        """What they make of states (D, B), one below the other."""
        result = np.empty((self._parts[-1].stop, states.shape[1]), np.float32)
        products = [(held(), states, result[part]) for held, part in zip(self._weights, self._parts, strict=True)]
        for part, added in self._hands.multiply(products, lambda: self._adapted(states)):
            result[part] += added
        for bias, part in zip(self._biases, self._parts, strict=True):
            if bias:
                result[part] += bias()[:, None]
        return result

    def _adapted(self, states: Array) -> list[tuple[slice, Array]]:
        return [(part, adapter(states)) for adapter, part in self._adapters]


class _Adapter:
    """What a LoRA adds."""

    def __init__(self, layer: Any) -> None:
        self._first, self._second = _Held(layer, "lora_a"), _Held(layer, "lora_b")
        self._scale = np.float32(layer.scale)

    def __call__(self, states: Array) -> Array:
        narrow = self._first().T @ states
        narrow *= self._scale
        result: Array = self._second().T @ narrow
        return result


class _Norm:
    """RMS norm of columns (…, D, B)."""

    def __init__(self, norm: Any) -> None:
        self._weight, self._eps = _Held(norm, "weight"), np.float32(norm.eps)

    def __call__(self, states: Array) -> Array:
        scale = np.einsum("...db,...db->...b", states, states)
        scale /= states.shape[-2]
        scale += self._eps
        np.sqrt(scale, out=scale)
        result: Array = states / scale[..., None, :]
        result *= self._weight()[:, None]
        return result


class _Held:
    """The memory of a module's array, looked up anew when another array has taken its place.

    So whoever changes weights puts a new array there, as optimizers and `update` do, and never writes into the old one.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name
        self._array: mx.array | None = None
        self._found: Array = np.empty(0, np.float32)

    def __call__(self) -> Array:
        array = self._module[self._name]
        if array is not self._array:
            self._array, self._found = array, _view(array)
        return self._found


def _plain_head(head: OutputHead) -> bool:
    """Whether a head is one product and nothing else."""
    layer = head.layer
    return type(layer) in {nn.Linear, nn.Embedding} and "bias" not in layer and bool(head.plain)


def _turn(vectors: Array, turns: Turns) -> None:
    """Turn vectors (H, D, B) in place."""
    half = vectors.shape[1] // 2
    first, second = vectors[:, :half], vectors[:, half:]
    cosines, sines = turns
    turned = first * cosines - second * sines
    second *= cosines
    second += first * sines
    first[:] = turned


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
