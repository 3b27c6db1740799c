"""Scores against a float64 softmax over a plain mlx-lm forward of the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import load_model, quantize_model, save_model

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import TeacherService
from opd_daemon.types import ScoreRequest, Scores, ScoreWants
from tests.families import family_config, tiny_family
from tests.teacher.resident import Home, random_ids, reference, score_all
from tests.tiny import write_tiny_qwen2

TOLERANCE = 1e-4
EVERYTHING = ScoreWants(token_stats=True, top_k=8, log_z_temperatures=(0.5, 2.0), hidden=True)


def full_request(size: int = 24, score_from: int = 3, seed: int = 0, masked: tuple[int, ...] = ()) -> ScoreRequest:
    ids = random_ids(size, seed)
    candidates = random_ids((size - score_from) * 5, seed + 1).reshape(-1, 5)
    candidates[:, 3] = candidates[:, 1]
    candidates[::2, 4] = -1
    return ScoreRequest(ids, score_from, EVERYTHING, candidates, masked)


def check(model: Path, request: ScoreRequest, scores: Scores) -> None:
    rows = np.arange(request.rows)
    expected = reference(model, request.token_ids, request.masked_token_ids)[request.score_from - 1 :]
    actual = request.token_ids[request.score_from :]
    close = {"atol": TOLERANCE, "rtol": 0}
    np.testing.assert_allclose(scores.token_logprobs, expected[rows, actual], **close)
    np.testing.assert_array_equal(scores.ranks, (expected > expected[rows, actual, None]).sum(-1))
    mass = np.exp(expected)
    np.testing.assert_allclose(scores.entropies, -(mass * np.maximum(expected, -1e9)).sum(-1), **close)
    check_top(request, scores, expected)
    check_candidates(request, scores, expected)
    for column, temperature in enumerate(request.wants.log_z_temperatures):
        log_z = np.log(np.exp(expected / temperature).sum(-1))
        np.testing.assert_allclose(scores.log_z[:, column], log_z, **close)


def check_top(request: ScoreRequest, scores: Scores, expected: np.ndarray) -> None:
    best = np.argsort(-expected, axis=-1, kind="stable")[:, : request.wants.top_k]
    np.testing.assert_array_equal(scores.top_ids, best)
    np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(expected, best, 1), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(scores.top_tail, log_mass_outside(expected, best), atol=TOLERANCE, rtol=0)


def check_candidates(request: ScoreRequest, scores: Scores, expected: np.ndarray) -> None:
    ids = request.candidate_ids
    wanted = np.where(ids < 0, -np.inf, np.take_along_axis(expected, np.maximum(ids, 0), 1))
    np.testing.assert_allclose(scores.candidate_logprobs, wanted, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(scores.candidate_tail, log_mass_outside(expected, ids), atol=TOLERANCE, rtol=0)


def log_mass_outside(expected: np.ndarray, ids: np.ndarray) -> np.ndarray:
    rest = np.exp(expected)
    for row, chosen in enumerate(ids):
        rest[row, chosen[chosen >= 0]] = 0
    return np.log(rest.sum(-1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [None, 403, 512])
def test_every_output_equals_the_float64_reference(home: Home, tmp_path: Path, tied: bool, vocab: int | None) -> None:
    model = write_tiny_qwen2(tmp_path / "model", seed=3, vocab=vocab, tie_word_embeddings=tied)
    request = full_request()

    async def work(service: TeacherService) -> Scores:
        return (await score_all(service, [request]))[0].scores

    check(model, request, home.run(work, model))


def test_masked_ids_get_no_mass_and_the_rest_is_normalised(home: Home, tiny_teacher: Path) -> None:
    unmasked = full_request()
    masked = tuple(int(index) for index in {*unmasked.candidate_ids[:, 0], unmasked.token_ids[10], 402, 7})
    request = full_request(masked=masked)

    async def work(service: TeacherService) -> Scores:
        return (await score_all(service, [request]))[0].scores

    scores = home.run(work, tiny_teacher)
    check(tiny_teacher, request, scores)
    assert np.isneginf(scores.candidate_logprobs[:, 0]).all()
    assert not np.isin(scores.top_ids, masked).any()


@pytest.mark.parametrize("settings", [{}, {"piece": 7}, {"token_budget": 32}, {"piece": 1}])
def test_strangers_in_the_batch_and_pieces_change_nothing(
    home: Home, tiny_teacher: Path, settings: dict[str, int]
) -> None:
    requests = [
        full_request(40, 3),
        full_request(33, 30, seed=5),
        full_request(12, 1, seed=6, masked=(3, 4)),
        ScoreRequest(random_ids(25, 9), 24, ScoreWants(token_stats=False, top_k=1)),
        ScoreRequest(random_ids(2, 8), 1, ScoreWants()),
        full_request(50, 49, seed=7),
    ]

    async def work(service: TeacherService) -> list[Scores]:
        return [found.scores for found in await score_all(service, requests, use_cache=False)]

    together = home.run(work, tiny_teacher, **settings)
    for index in (0, 1, 2, 5):
        check(tiny_teacher, requests[index], together[index])
    np.testing.assert_array_equal(together[3].top_ids[:, 0], together_best(tiny_teacher, requests[3]))
    assert together[3].token_logprobs is None
    assert together[4].token_logprobs.shape == (1,)


def together_best(model: Path, request: ScoreRequest) -> np.ndarray:
    return reference(model, request.token_ids)[request.score_from - 1 :].argmax(-1)


def test_hidden_states_times_the_head_are_the_logits(home: Home, tiny_teacher: Path) -> None:
    request = full_request()

    async def work(service: TeacherService) -> Scores:
        return (await score_all(service, [request]))[0].scores

    scores = home.run(work, tiny_teacher)
    model, _ = load(str(tiny_teacher))
    plain = np.array(model(mx.array(request.token_ids[None]))[0, request.score_from - 1 : -1])
    rebuilt = np.array(model.model.embed_tokens.as_linear(mx.array(scores.hidden)))
    assert scores.hidden_dtype == "float32"
    np.testing.assert_allclose(rebuilt, plain, atol=1e-4, rtol=0)


def test_bfloat16_hidden_states_travel_as_bit_patterns(home: Home, tiny_teacher: Path, tmp_path: Path) -> None:
    model = as_bfloat16(tiny_teacher, tmp_path / "bf16")
    request = ScoreRequest(random_ids(8), 1, ScoreWants(hidden=True))

    async def work(service: TeacherService) -> Scores:
        assert service.info.dtype == "bfloat16"
        return (await score_all(service, [request]))[0].scores

    scores = home.run(work, model)
    loaded, _ = load(str(model))
    plain = loaded.model(mx.array(request.token_ids[None, :-1]))[0].astype(mx.float32)
    states = (scores.hidden.astype(np.uint32) << 16).view(np.float32)
    assert (scores.hidden.dtype, scores.hidden_dtype) == (np.uint16, "bfloat16")
    np.testing.assert_allclose(states, np.array(plain), atol=0.05, rtol=0.02)
    expected = reference(model, request.token_ids)
    np.testing.assert_allclose(scores.token_logprobs, expected[np.arange(7), request.token_ids[1:]], atol=0.1)


def as_bfloat16(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(source / "model.safetensors")).items()}
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def test_the_whole_vocabulary_can_be_asked_for(home: Home, tiny_teacher: Path) -> None:
    async def work(service: TeacherService) -> Scores:
        request = ScoreRequest(random_ids(6), 1, ScoreWants(top_k=service.info.vocab_size))
        return (await score_all(service, [request]))[0].scores

    scores = home.run(work, tiny_teacher)
    assert np.isneginf(scores.top_tail).all()
    assert (np.sort(scores.top_ids, axis=-1) == np.arange(scores.top_ids.shape[1])).all()
    assert (np.diff(scores.top_logprobs, axis=-1) <= 0).all()


@pytest.mark.parametrize("wants", [EVERYTHING, ScoreWants(token_stats=False, hidden=True)])
def test_weights_that_are_no_numbers_are_an_error_not_a_result(
    home: Home, tiny_teacher: Path, tmp_path: Path, wants: ScoreWants
) -> None:
    model = as_bfloat16(tiny_teacher, tmp_path / "broken")
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * mx.nan
    mx.save_safetensors(str(model / "model.safetensors"), weights)

    async def work(service: TeacherService) -> None:
        await score_all(service, [ScoreRequest(random_ids(9), 1, wants)])

    with pytest.raises(OpdError, match="not a number") as caught:
        home.run(work, model)
    assert caught.value.reason is Reason.NOT_A_NUMBER
    assert not home.entries()


def test_a_model_whose_head_is_part_of_its_body_runs_whole_and_refuses_hidden(home: Home, tiny_teacher: Path) -> None:
    model = write_family(tiny_teacher, home.cache.parent / "neox", "gpt_neox")
    request = replace(full_request(), wants=replace(EVERYTHING, hidden=False))

    async def work(service: TeacherService) -> Scores:
        assert not service.info.supports_hidden
        assert "a body and an output head" in service.info.hidden_refusal
        with pytest.raises(OpdError) as caught:
            service.score([full_request()])
        assert caught.value.reason is Reason.HIDDEN_NOT_SUPPORTED
        return (await score_all(service, [request]))[0].scores

    check(model, request, home.run(work, model, piece=9))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_model_that_caps_or_scales_its_logits_serves_everything(home: Home, tiny_teacher: Path, family: str) -> None:
    model = write_family(tiny_teacher, home.cache.parent / family, family)

    async def work(service: TeacherService) -> Scores:
        assert service.info.supports_hidden
        return (await score_all(service, [full_request()]))[0].scores

    check(model, full_request(), home.run(work, model, piece=9))


def write_family(source: Path, target: Path, family: str) -> Path:
    target.mkdir(parents=True)
    for file in source.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())
    config = family_config(family, vocab_size=448, eos_token_id=402)
    (target / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(tiny_family(family, vocab_size=448).parameters()))
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def test_states_alone_are_served_without_running_the_head(
    home: Home, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = full_request()
    alone = ScoreRequest(request.token_ids, request.score_from, ScoreWants(token_stats=False, hidden=True))

    async def work(service: TeacherService) -> None:
        everything = (await score_all(service, [request]))[0].scores
        monkeypatch.setattr("opd_daemon.teacher.scoring.describe", lambda *_: pytest.fail("the head was run"))
        states = (await score_all(service, [alone]))[0].scores
        assert states.arrays().keys() == {"hidden"}
        np.testing.assert_array_equal(states.hidden, everything.hidden)

    home.run(work, tiny_teacher)


def test_a_quantised_model_scores_as_mlx_lm_runs_it(home: Home, tiny_teacher: Path, tmp_path: Path) -> None:
    model = quantised(tiny_teacher, tmp_path / "quantised")

    async def work(service: TeacherService) -> Scores:
        assert service.info.quantization_bits == 4
        return (await score_all(service, [full_request()]))[0].scores

    check(model, full_request(), home.run(work, model))


def quantised(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())
    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(target, model)
    (target / "config.json").write_text(json.dumps(config))
    return target
