"""Every output of ComputeLogprobs, over the wire and on real weights, against float64 over a plain mlx-lm forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import numpy.typing as npt
import pytest

from opd_daemon.client import Client
from opd_daemon.home import Home
from opd_daemon.types import CachedScores, ScoreRequest, ScoreWants
from tests.e2e.conftest import DaemonProcess

TOP_K = 64
TEMPERATURES = (0.5, 2.0, 4.0)
TOLERANCE = 1e-4
TIE = 5e-6
Float64 = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def client(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = Home(tmp_path_factory.mktemp("logprobs") / "home")
    home.root.mkdir()
    daemon = DaemonProcess(home)
    with daemon.client() as client:
        for _ in client.load_teacher(str(smollm2)):
            pass
        yield client
    daemon.stop()


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Any:
    return mlx_lm.load(str(smollm2))[0]


def sequences(plain: Any, seed: int, *lengths: int) -> list[npt.NDArray[np.int32]]:
    vocabulary = plain.args.vocab_size
    generator = np.random.default_rng(seed)
    return [generator.integers(20, vocabulary, length, dtype=np.int32) for length in lengths]


def reference(plain: Any, ids: npt.NDArray[np.int32]) -> Float64:
    """Logprobs (n − 1, V) in float64: row i − 1 is the distribution of token i."""
    logits = np.array(plain(mx.array(ids[None]))[0, :-1]).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def request(ids: npt.NDArray[np.int32], score_from: int = 1) -> ScoreRequest:
    rows = len(ids) - score_from
    candidates = np.random.default_rng(int(ids[0])).integers(20, 49_000, (rows, 8), dtype=np.int32)
    candidates[:, 5] = candidates[:, 4]
    candidates[:, 6] = -1
    wants = ScoreWants(token_stats=True, top_k=TOP_K, log_z_temperatures=TEMPERATURES, hidden=True)
    return ScoreRequest(ids, score_from, wants, candidates)


def check(plain: Any, asked: ScoreRequest, answer: CachedScores) -> None:
    """Compare every output with the float64 reference."""
    expected = reference(plain, asked.token_ids)[asked.score_from - 1 :]
    rows = np.arange(len(expected))
    actual = asked.token_ids[asked.score_from :]
    scores = answer.scores
    close(scores.token_logprobs, expected[rows, actual])
    # Far down the ranking neighbours are closer than float32 tells apart.
    own = expected[rows, actual][:, None]
    assert scores.ranks is not None
    assert ((expected > own + TOLERANCE).sum(-1) <= scores.ranks).all()
    assert (scores.ranks <= (expected > own - TOLERANCE).sum(-1)).all()
    close(scores.entropies, -(np.exp(expected) * expected).sum(-1))

    top = np.argsort(-expected, axis=-1, kind="stable")[:, :TOP_K]
    assert scores.top_ids is not None
    same = scores.top_ids == top
    # Two ids may only change places where float32 can't tell their logits apart.
    ties = np.abs(np.take_along_axis(expected, scores.top_ids, 1) - np.take_along_axis(expected, top, 1)) < TIE
    assert (same | ties).all()
    assert same.mean() > 0.999
    close(scores.top_logprobs, np.take_along_axis(expected, top, 1))
    close(scores.top_tail, np.log(1 - np.exp(np.take_along_axis(expected, top, 1)).sum(-1)))

    assert asked.candidate_ids is not None
    chosen = np.take_along_axis(expected, np.maximum(asked.candidate_ids, 0), 1)
    used = asked.candidate_ids >= 0
    assert scores.candidate_logprobs is not None
    close(scores.candidate_logprobs[used], chosen[used])
    assert np.isneginf(scores.candidate_logprobs[~used]).all()
    distinct = [set(row[row >= 0]) for row in asked.candidate_ids]
    mass = np.array([sum(np.exp(expected[row, token]) for token in ids) for row, ids in enumerate(distinct)])
    close(scores.candidate_tail, np.log1p(-mass))

    log_z = [np.log(np.exp(expected / temperature).sum(-1)) for temperature in TEMPERATURES]
    close(scores.log_z, np.stack(log_z, -1))
    logits = np.array(plain(mx.array(asked.token_ids[None]))[0, asked.score_from - 1 : -1])
    rebuilt = np.array(plain.model.embed_tokens.as_linear(mx.array(np.asarray(scores.hidden))))
    np.testing.assert_allclose(rebuilt, logits, atol=2e-4, rtol=0)


def close(found: Any, expected: Float64) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_alone_cold_and_from_the_cache(client: Client, plain: Any) -> None:
    (ids,) = sequences(plain, 1, 40)
    asked = request(ids)
    (cold,) = client.score([asked])
    (warm,) = client.score([asked])
    assert (cold.cached, warm.cached) == (False, True)
    check(plain, asked, cold)
    check(plain, asked, warm)
    for name, array in cold.scores.arrays().items():
        np.testing.assert_array_equal(array, warm.scores.arrays()[name])


def test_batched_with_strangers(client: Client, plain: Any) -> None:
    asked = [request(ids, 1 + index) for index, ids in enumerate(sequences(plain, 2, 2, 30, 33, 48, 20))]
    for one, answer in zip(asked, client.score(asked), strict=True):
        check(plain, one, answer)


def test_long_sequence_in_pieces(client: Client, plain: Any) -> None:
    (ids,) = sequences(plain, 3, 700)
    asked = request(ids, 640)
    check(plain, asked, client.score([asked])[0])


def test_generated_tokens_carry_the_logprobs_that_scoring_gives(client: Client, plain: Any) -> None:
    from opd_daemon.types import GenerateRequest

    (prompt,) = sequences(plain, 4, 12)
    prompts = [GenerateRequest(tuple(prompt.tolist()), 10, temperature=1.0, seed=seed) for seed in (1, 2)]
    completions = client.generate(prompts)
    assert completions[0] != completions[1]
    for completion in completions:
        ids = np.concatenate([prompt, [token.token_id for token in completion]]).astype(np.int32)
        scores = client.score([ScoreRequest(ids, len(prompt))])[0].scores
        np.testing.assert_allclose([token.logprob for token in completion], scores.token_logprobs, atol=1e-3)
