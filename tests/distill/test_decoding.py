"""Batched decoding: the same tokens as whole forwards with every kind of cache, drawn from the right distribution."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, lfm2
from mlx_lm.models.cache import ChunkedKVCache

from opd_daemon.config import LoraConfig
from opd_daemon.distill import decoding
from opd_daemon.distill.decoding import Continuation, Sampling, decode, repeats, sample
from opd_daemon.distill.logits import IMPOSSIBLE, VocabularyMask
from opd_daemon.distill.student import Student

WIDTH = 300
HOSTS = pytest.mark.parametrize("host", [True, False])


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Student:
    return Student.load(tiny_student, None, LoraConfig(rank=4), seed=0)


def gemma() -> Any:
    """Sliding windows shorter than what is decoded, and a full layer."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
    settings |= {"head_dim": 16, "vocab_size": WIDTH, "num_key_value_heads": 1, "sliding_window": 8}
    settings |= {"sliding_window_pattern": 2, "max_position_embeddings": 256}
    return gemma3_text.Model(gemma3_text.ModelArgs.from_dict({"model_type": "gemma3_text", **settings}))


def hybrid() -> Any:
    """Short convolutions, whose state is not keys and values, and one attention layer."""
    settings = {"vocab_size": WIDTH, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "norm_eps": 1e-5, "conv_bias": False}
    settings |= {"conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 64, "block_multiple_of": 8}
    settings |= {"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "rope_theta": 1e4}
    return lfm2.Model(lfm2.ModelArgs.from_dict({"model_type": "lfm2", **settings, "full_attn_idxs": [1]}))


def unbatchable(student: Student) -> Any:
    """A model whose caches hold one sequence only."""
    model = student.model

    class Chunked:
        layers = model.layers

        def __call__(self, *arguments: Any, **named: Any) -> mx.array:
            return model(*arguments, **named)

        def make_cache(self) -> list[ChunkedKVCache]:
            return [ChunkedKVCache(4096) for _ in model.layers]

    return Chunked()


def as_student(model: Any, largest_batch: int = 64) -> Any:
    if hasattr(model, "parameters"):
        mx.eval(model.parameters())
    return SimpleNamespace(
        model=model,
        decoder=lambda tokens, cache: model(tokens, cache=cache),
        vocabulary=VocabularyMask(WIDTH),
        vocab_size=WIDTH,
        eos_ids=(),
        largest_batch=largest_batch,
    )


def continuations(lengths: list[int], tokens: int) -> list[Continuation]:
    numbers = np.random.default_rng(3)
    return [Continuation(tuple(numbers.integers(0, WIDTH, n).tolist()), numbers.random(tokens)) for n in lengths]


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "hybrid", "unbatchable"])
def test_greedy_is_what_whole_forwards_say_with_every_kind_of_cache(student: Student, kind: str) -> None:
    mx.random.seed(0)
    models = {"qwen2": lambda: student.model, "gemma": gemma, "hybrid": hybrid}
    model = unbatchable(student) if kind == "unbatchable" else models[kind]()
    rows = continuations([9, 1, 5, 17], 14)
    rows += [Continuation(rows[0].prompt, rows[0].uniforms)]
    decode(as_student(model), rows, Sampling(14, 0.0))
    for row in rows:
        logits = model(mx.array([[*row.prompt, *row.token_ids]]))[0, len(row.prompt) - 1 : -1, :WIDTH]
        assert mx.argmax(logits, axis=-1).tolist() == row.token_ids
    assert rows[-1].token_ids == rows[0].token_ids


def test_equal_prompts_are_read_once(student: Student) -> None:
    asked: list[tuple[int, ...]] = []
    model = student.model

    class Listening:
        layers = model.layers

        def __call__(self, tokens: mx.array, **named: Any) -> mx.array:
            asked.append(tokens.shape)
            return model(tokens, **named)

    (row,) = continuations([9], 2)
    decode(as_student(Listening()), [Continuation(row.prompt, row.uniforms) for _ in range(6)], Sampling(2, 1.0))
    assert asked == [(1, 8), (6, 1), (6, 1)]


def test_more_rows_than_fit_are_decoded_in_turn(student: Student) -> None:
    together, apart = continuations([4, 6, 8, 3, 5], 6), continuations([4, 6, 8, 3, 5], 6)
    decode(as_student(student.model), together, Sampling(6, 1.0))
    decode(as_student(student.model, largest_batch=2), apart, Sampling(6, 1.0))
    assert [row.token_ids for row in together] == [row.token_ids for row in apart]


@HOSTS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_distribution_and_never_hidden_ids(
    host: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "on_host", lambda: host)
    numbers = np.random.default_rng(0)
    logits = (3.0 * numbers.standard_normal(1000)).astype(np.float32)
    logits[900:] = IMPOSSIBLE
    draws = 20_000
    rows = mx.broadcast_to(mx.array(logits), (200, 1000))
    ids = np.concatenate([sample(rows, temperature, numbers.random(200))[0] for _ in range(draws // 200)])
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * weights / weights.sum()
    counts = np.bincount(ids, minlength=1000)
    assert counts[900:].sum() == 0
    large = expected > 5
    squares = (counts[large] - expected[large]) ** 2 / expected[large]
    assert squares.sum() < 1.3 * large.sum()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_host_and_device_choose_the_same(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(1)
    logits = mx.array((4.0 * numbers.standard_normal((64, 777))).astype(np.float32))
    uniforms = numbers.random(64)
    host = sample(logits, temperature, uniforms)
    monkeypatch.setattr(decoding, "on_host", lambda: False)
    device = sample(logits, temperature, uniforms)
    assert host[0].tolist() == device[0].tolist()
    np.testing.assert_allclose(host[1], device[1], atol=1e-5)


@HOSTS
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_choose_possible_ids(
    host: bool, uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "on_host", lambda: host)
    logits = np.full((1, 1024), IMPOSSIBLE, dtype=np.float32)
    logits[0, 300:600] = np.linspace(-3, 3, 300)
    ids, _ = sample(mx.array(logits), 1.0, np.array([uniform]))
    assert ids[0] == (300 if uniform == 0 else 599)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([7] * 16, True),
        ([7] * 15, False),
        ([1, 2, 3, 4, 5] * 4, True),
        ([9, *([1, 2, 3, 4, 5] * 4)], True),
        ([1, 2, 3, 4, 5] * 3, False),
        ([*range(40), *range(40), *range(40), *range(40)], True),
        (list(range(200)), False),
        ([], False),
    ],
)
def test_a_phrase_said_four_times_and_for_16_tokens_is_a_repetition(tokens: list[int], found: bool) -> None:
    assert repeats(tokens, 4) is found
