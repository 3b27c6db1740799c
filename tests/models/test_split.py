"""Body and head together give the model's own logits, whatever follows the head; what can't be proved runs whole."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from opd_daemon.models.split import OutputHead, SplitModel, split
from tests.families import FAMILIES, VOCAB, tiny_family

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def assert_equal_logits(parts: SplitModel, model: Any, rtol: float = 1e-5) -> None:
    whole = np.array(model(TOKENS).astype(mx.float32))
    rebuilt = np.array(parts.head(parts.body(TOKENS)).astype(mx.float32))
    np.testing.assert_allclose(rebuilt, whole, rtol=0, atol=rtol * np.abs(whole).max())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_model_gives_its_own_logits(family: str, quantised: bool) -> None:
    model = tiny_family(family, quantised=quantised)
    parts = split(model, VOCAB)
    assert parts.refusal == ""
    assert (parts.hidden_size, parts.width) == (32, VOCAB)
    assert isinstance(parts.head, OutputHead)
    assert (parts.head.logit_scale, parts.head.soft_cap) == pytest.approx(FAMILIES[family][1])
    assert_equal_logits(parts, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_is_split_up_to_its_own_rounding(family: str) -> None:
    model = tiny_family(family)
    model.set_dtype(mx.bfloat16)
    parts = split(model, VOCAB)
    assert (parts.refusal, parts.dtype) == ("", mx.bfloat16)
    assert isinstance(parts.head, OutputHead)
    assert parts.head.plain == (FAMILIES[family][1] == (1.0, 0.0))
    assert_equal_logits(parts, model, rtol=0.02)


def test_the_body_continues_from_a_cache() -> None:
    model = tiny_family("gemma2")
    parts = split(model, VOCAB)
    cache = make_prompt_cache(model)
    pieces = [parts.head(parts.body(TOKENS[:, start : start + 4], cache)) for start in (0, 4)]
    np.testing.assert_allclose(np.array(mx.concatenate(pieces, 1)), np.array(model(TOKENS)), atol=1e-5)


class Odd:
    """A model that bends its logits as no setting of it says."""

    def __init__(self, model: Any) -> None:
        self.model = model.model
        self.whole = model

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return mx.tanh(self.whole(tokens, cache=cache) / 5.0) * 5.0


def test_a_head_with_anything_unknown_behind_it_is_not_split() -> None:
    odd = Odd(tiny_family("qwen2"))
    parts = split(odd, VOCAB)
    assert "known scale or soft cap" in parts.refusal
    assert mx.array_equal(parts.head(parts.body(TOKENS)), odd(TOKENS))


def test_a_model_without_a_body_of_its_own_is_not_split() -> None:
    model = tiny_family("qwen2")
    parts = split(lambda tokens, cache=None: model(tokens, cache=cache), VOCAB)
    assert "arranged" in parts.refusal
    assert mx.array_equal(parts.head(parts.body(TOKENS)), model(TOKENS))


def test_damaged_weights_are_no_reason_to_run_whole() -> None:
    model = tiny_family("llama")
    model.model.norm.weight = model.model.norm.weight * mx.nan
    assert split(model, VOCAB).refusal == ""
