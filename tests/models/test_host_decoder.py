"""Decoding in numpy gives the model's own logits, or the model itself decodes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from opd_daemon.models.host_decoder import MOST_ROWS, HostDecoder, decoder_of
from opd_daemon.models.split import split
from tests.families import FAMILIES, VOCAB, tiny_family

HOST = mx.default_device() == mx.Device(mx.cpu)
LLAMA_LIKE = ("llama", "qwen2", "qwen3")

pytestmark = pytest.mark.skipif(not HOST, reason="there is nothing to decode with on a GPU but the model")


def decoder(model: Any) -> Any:
    return decoder_of(model, split(model, VOCAB))


def adapted(name: str, *, dora: bool = False) -> Any:
    """A model with an adapter that changes what it says."""
    model = tiny_family(name)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.0}, use_dora=dora)
    for key, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(key)))
    model.eval()
    mx.eval(model.parameters())
    return model


def continued(step: Any, model: Any, rows: list[list[int]], steps: int, *, keep: list[int] | None = None) -> np.ndarray:
    """Logits of `steps` tokens behind left-padded prompts; after the first one only the rows of `keep` go on."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    cache = [BatchKVCache(padding) for _ in model.layers]
    model(mx.array([[0] * lacking + row for lacking, row in zip(padding, rows, strict=True)]), cache=cache)
    places = keep or list(range(len(rows)))
    found = [np.array(step(mx.array([[7 + place] for place in range(len(rows))]), cache))[places]]
    for entry in cache:
        entry.filter(mx.array(places))
    tokens = [mx.array([[(11 * count + place) % VOCAB] for place in places]) for count in range(1, steps)]
    return np.concatenate([*found, *(np.array(step(ids, cache)) for ids in tokens)], axis=1)


def plain(model: Any) -> Any:
    return lambda tokens, cache: model(tokens, cache=cache)


@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("keep", [None, [0, 2]])
def test_steps_of_unlike_sequences_give_the_models_logits(name: str, keep: list[int] | None) -> None:
    model = adapted(name)
    host = decoder(model)
    assert isinstance(host, HostDecoder)
    rows = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9, 7]]
    found, expected = (continued(step, model, rows, 70, keep=keep) for step in (host, plain(model)))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_one_sequence_in_a_cache_of_its_own() -> None:
    model = adapted("llama")
    host = decoder(model)
    answers = []
    for step in (host, plain(model)):
        cache = make_prompt_cache(model)
        model(mx.array([[5, 6, 7]]), cache=cache)
        answers.append([np.array(step(mx.array([[place]]), cache)) for place in range(6)])
    np.testing.assert_allclose(*answers, atol=2e-4 * np.abs(answers[1]).max())


def test_an_updated_adapter_counts_at_once() -> None:
    model = adapted("qwen2")
    host = decoder(model)
    before = continued(host, model, [[3, 1, 4]], 2)
    layer = model.layers[0].mlp.down_proj
    layer.lora_b = layer.lora_b + 0.5
    after, expected = continued(host, model, [[3, 1, 4]], 2), continued(plain(model), model, [[3, 1, 4]], 2)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(LLAMA_LIKE)))
def test_models_that_compute_something_else_decode_themselves(name: str) -> None:
    model = tiny_family(name)
    step = decoder(model)
    assert not isinstance(step, HostDecoder)
    cache, own = make_prompt_cache(model), make_prompt_cache(model)
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(step(tokens, cache), model(tokens, cache=own), atol=1e-4)


@pytest.mark.parametrize("model", [tiny_family("llama", quantised=True), adapted("llama", dora=True)])
def test_layers_of_another_kind_are_left_to_the_model(model: Any) -> None:
    assert not isinstance(decoder(model), HostDecoder)


def test_a_model_whose_steps_come_out_otherwise_decodes_itself() -> None:
    model = tiny_family("llama")
    assert isinstance(decoder(model), HostDecoder)
    block = model.layers[1]

    class Shifted(type(block)):  # type: ignore[misc]
        def __call__(self, states: mx.array, *arguments: Any, **named: Any) -> mx.array:
            return super().__call__(states, *arguments, **named) + 0.1 * mx.arange(states.shape[-1])

    block.__class__ = Shifted
    assert not isinstance(decoder(model), HostDecoder)


def test_many_rows_and_many_tokens_go_through_the_model() -> None:
    model = tiny_family("llama")
    host = decoder(model)
    for tokens in (mx.ones((2, 3), dtype=mx.int32), mx.ones((MOST_ROWS + 1, 1), dtype=mx.int32)):
        caches = [[BatchKVCache([0] * len(tokens)) for _ in model.layers] for _ in range(2)]
        assert mx.array_equal(host(tokens, caches[0]), model(tokens, cache=caches[1]))
