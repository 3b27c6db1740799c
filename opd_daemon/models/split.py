"""A language model split into its body (tokens to hidden states) and its output head (hidden states to logits).

Teacher and student run their heads only on the rows that are asked for, and the teacher's head travels to the worker.
What a model does to its logits behind the matrix product (a scale, a soft cap) is read off its settings and then
proved: on a probe, head and body together must give the model's own logits. A model that fails the proof runs whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import mlx.core as mx

PROBE_TOKENS = 12
PLAIN_TOLERANCE = 1e-5
# A scale or cap is applied here in float32, by the model in its own type: that many roundings apart, at most.
ROUNDINGS = 4

# Where mlx-lm's models keep body, head and tied embedding.
BODIES = ("model", "transformer", "backbone")
HEADS = ("lm_head", "output")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "token_embeddings",
    "embeddings",
    "embedding",
)
# Settings whose quotient is the factor on the logits; an empty name stands for 1. MiniCPM divides the states instead.
SCALES = (
    ("logit_scale", ""),
    ("output_multiplier", ""),
    ("", "logits_scaling"),
    ("dim_model_base", "hidden_size"),
    ("lm_head_multiplier", "embedding_multiplier"),
)
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# The one whose cap is no setting.
NANOCHAT_SOFT_CAP = 15.0


class Body(Protocol):
    """Tokens (B, T), with an optional KV cache, to states (B, T, D)."""

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """The states after the final norm."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """Logits of states: z = logit_scale · layer(state) or, where soft_cap is not 0, soft_cap · tanh(z / soft_cap).

    layer: a linear layer, or the embedding it is tied to, quantised or not.
    """

    layer: Any
    logit_scale: float = 1.0
    soft_cap: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether logits are what the layer gives."""
        return self.logit_scale == 1 and not self.soft_cap

    def __call__(self, states: mx.array) -> mx.array:
        """Logits (…, V) of states (…, D)."""
        return finish(getattr(self.layer, "as_linear", self.layer)(states), self.logit_scale, self.soft_cap)


@dataclass(frozen=True, slots=True, eq=False)
class SplitModel:
    """body: tokens (B, T) and an optional KV cache to states (B, T, D); head: states (…, D) to logits (…, V).

    Where the model can't be split, `refusal` says why, the body gives the logits and the head nothing more.
    """

    body: Body
    head: OutputHead | Callable[[mx.array], mx.array]
    hidden_size: int
    width: int
    dtype: mx.Dtype
    refusal: str = ""


def split(model: Any, vocab_size: int) -> SplitModel:
    """Split `model` if head(body(x)) equals model(x) on a probe of `PROBE_TOKENS` ids below vocab_size."""
    probe = (mx.arange(PROBE_TOKENS) * 7919 % vocab_size)[None]
    logits = _logits(model(probe))
    outer = getattr(model, "language_model", model)
    inner = _member(outer, BODIES)
    heads = list(_heads(outer, inner)) if inner is not None else []
    if not heads:
        return _whole(model, logits, "its layers aren't arranged as a body and an output head")

    def body(tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        states: mx.array = inner(tokens, cache=cache)
        return states

    try:
        states = body(probe)
        found = next((head for head in heads if _proved(head, states, logits)), None)
    except (TypeError, AttributeError) as error:
        return _whole(model, logits, f"its body can't be called by itself ({error})")
    if found is None:
        return _whole(model, logits, "it does more behind its output head than a known scale or soft cap")
    return SplitModel(body, found, states.shape[-1], logits.shape[-1], states.dtype)


def finish(products: mx.array, logit_scale: float, soft_cap: float) -> mx.array:
    """Logits from the products of a head's matrix; float32 wherever there is anything to do."""
    if logit_scale != 1:
        products = products.astype(mx.float32) * logit_scale
    if soft_cap:
        products = soft_cap * mx.tanh(products.astype(mx.float32) / soft_cap)
    return products


def _whole(model: Any, logits: mx.array, reason: str) -> SplitModel:
    def body(tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        return _logits(model(tokens, cache=cache))

    mx.eval(logits)
    refusal = f"the hidden states of this model can't be served: {reason}"
    return SplitModel(body, lambda rows: rows, logits.shape[-1], logits.shape[-1], logits.dtype, refusal)


def _heads(outer: Any, inner: Any) -> Iterator[OutputHead]:
    """What the head may be: plain before processed, a matrix of its own before a tied one."""
    layers = [layer for layer in (_member(outer, HEADS), _member(inner, EMBEDDINGS)) if layer is not None]
    finishes = list(product(_scales(outer, inner), _soft_caps(outer, inner)))
    for (scale, cap), layer in product(finishes, layers):
        yield OutputHead(layer, scale, cap)


def _scales(outer: Any, inner: Any) -> list[float]:
    found = [1.0]
    for above, below in SCALES:
        values = [_setting(name, outer, inner) if name else 1.0 for name in (above, below)]
        if all(values):
            # As it travels: float32.
            found.append(mx.array(values[0] / values[1]).item())  # type: ignore[operator, arg-type]
    return found


def _soft_caps(outer: Any, inner: Any) -> list[float]:
    known = [_setting(name, outer, inner) for name in SOFT_CAPS]
    if getattr(outer, "model_type", "") == "nanochat":
        known.append(NANOCHAT_SOFT_CAP)
    return [0.0, *(cap for cap in known if cap)]


def _setting(name: str, outer: Any, inner: Any) -> float | None:
    holders = [outer, *(getattr(part, kind, None) for part in (outer, inner) for kind in ("args", "config"))]
    values = (getattr(holder, name, None) for holder in holders)
    return next((float(value) for value in values if isinstance(value, int | float) and value), None)


def _member(holder: Any, names: Sequence[str]) -> Any:
    return next((found for name in names if callable(found := getattr(holder, name, None))), None)


def _proved(head: OutputHead, states: mx.array, logits: mx.array) -> bool:
    try:
        rebuilt = head(states)
    except ValueError:  # a matrix of another shape
        return False
    if rebuilt.shape != logits.shape:
        return False
    first, second = rebuilt.astype(mx.float32), logits.astype(mx.float32)
    # Damaged weights give NaN both ways; that is for scoring to report.
    if bool(mx.array_equal(first, second, equal_nan=True)):
        return True
    rounding = 0.0 if head.plain else ROUNDINGS * float(mx.finfo(logits.dtype).eps)
    return bool(mx.abs(first - second).max() <= max(PLAIN_TOLERANCE, rounding) * mx.abs(second).max())


def _logits(output: Any) -> mx.array:
    return output if isinstance(output, mx.array) else output.logits
