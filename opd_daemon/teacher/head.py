"""A language model split into its body (tokens to hidden states) and its head (hidden states to logits).

Scoring runs the head only on the rows that are asked for. Models that do more to their logits than one matrix
product (soft caps, scales) are found by a probe and run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

PROBE_TOKENS = 12


@dataclass(frozen=True, slots=True, eq=False)
class SplitModel:
    """body: tokens (B, T) and an optional KV cache to states (B, T, D); head: states (N, D) to logits (N, V).

    Where the model can't be split, `refusal` says why, the body gives the logits and the head nothing more.
    """

    body: Callable[[mx.array, Sequence[Any] | None], mx.array]
    head: Callable[[mx.array], mx.array]
    hidden_size: int
    width: int
    dtype: mx.Dtype
    refusal: str = ""


def split(model: Any, vocab_size: int) -> SplitModel:
    """Split `model` if head(body(x)) equals model(x) on a probe of `PROBE_TOKENS` ids below vocab_size."""
    probe = (mx.arange(PROBE_TOKENS) * 7919 % vocab_size)[None]
    logits = model(probe)
    found = _parts(model)
    if found is None:
        return _whole(model, logits, "its layers aren't arranged as a body and an output head")
    body, head = found
    states = body(probe, None)
    rebuilt = head(states)
    if rebuilt.shape != logits.shape or not _same(rebuilt, logits):
        return _whole(model, logits, "it changes its logits after the output head (a soft cap or a scale)")
    return SplitModel(body, head, states.shape[-1], logits.shape[-1], states.dtype)


def _whole(model: Any, logits: mx.array, reason: str) -> SplitModel:
    def body(tokens: mx.array, cache: Sequence[Any] | None) -> mx.array:
        return _logits(model(tokens, cache=cache))

    mx.eval(logits)
    refusal = f"the hidden states of this model can't be served: {reason}"
    return SplitModel(body, lambda rows: rows, logits.shape[-1], logits.shape[-1], logits.dtype, refusal)


def _parts(model: Any) -> tuple[Callable[..., mx.array], Callable[[mx.array], mx.array]] | None:
    outer = getattr(model, "language_model", model)
    inner = getattr(outer, "model", None)
    if inner is None:
        return None
    if hasattr(outer, "lm_head"):
        head = outer.lm_head
    elif hasattr(inner, "embed_tokens") and hasattr(inner.embed_tokens, "as_linear"):
        head = inner.embed_tokens.as_linear
    else:
        return None
    return (lambda tokens, cache: inner(tokens, cache=cache)), head


def _same(first: mx.array, second: mx.array) -> bool:
    first, second = first.astype(mx.float32), second.astype(mx.float32)
    # Damaged weights give NaN both ways; that is for scoring to report.
    equal = mx.array_equal(first, second, equal_nan=True)
    return bool(equal) or bool(mx.abs(first - second).max() <= 1e-5 * mx.abs(second).max())


def _logits(output: Any) -> mx.array:
    return output if isinstance(output, mx.array) else output.logits
