"""A teacher in this process: the Teacher protocol over a plain mlx-lm model, everything else in float64 numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, load_tokenizer

from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import (
    CachedScores,
    GeneratedToken,
    GenerateRequest,
    ScoreRequest,
    Scores,
    TeacherInfo,
)
from opd_daemon.vocabulary import load_vocabulary


class LocalTeacher:
    """Scores in float64 from whole forwards; refuses hidden states when told to.

    Remembers what it said; once unloaded, it answers nothing else.
    """

    def __init__(self, path: Path, *, supports_hidden: bool = True) -> None:
        self.model, config = load_model(path)
        self.tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
        vocabulary = load_vocabulary(path)
        self.known: dict[str, Scores] = {}
        self.written: dict[GenerateRequest, list[GeneratedToken]] = {}
        self.unloaded = False
        self._head: TeacherHead | None = None
        self.info = TeacherInfo(
            name=path.name,
            path=str(path),
            digest="teacher",
            tokenizer_digest="tokenizer",
            architecture=config["model_type"],
            vocab_size=max(vocabulary) + 1,
            padded_vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            max_context=config["max_position_embeddings"],
            weight_bytes=0,
            dtype="float32",
            quantization_bits=0,
            supports_hidden=supports_hidden,
            hidden_refusal="" if supports_hidden else "told to refuse",
            eos_token_ids=tuple(sorted(self.tokenizer.eos_token_ids)),
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        answers = []
        for request in requests:
            key = request_key(request)
            cached = key in self.known
            if not cached:
                self.known[key] = self._scores(request)
            answers.append(CachedScores(self.known[key], cached, 1.0))
        return answers

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
        for request in requests:
            if request not in self.written:
                self.written[request] = self._continue(request)
        return [self.written[request] for request in requests]

    def head(self) -> TeacherHead:
        if not self.info.supports_hidden:
            raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, "told to refuse")
        if self._head is None:
            self._refuse_when_unloaded()
            tensors = {"weight": np.array(self.model.model.embed_tokens.weight)}
            self._head = TeacherHead(tensors, {"weight": "float32"})
        return self._head

    def unload(self) -> None:
        self.unloaded = True

    def _refuse_when_unloaded(self) -> None:
        if self.unloaded:
            raise OpdError(Reason.TEACHER_NOT_LOADED, "unloaded, and this was never asked")

    def _scores(self, request: ScoreRequest) -> Scores:
        self._refuse_when_unloaded()
        hidden = np.array(self.model.model(mx.array(request.token_ids)[None]))[0][request.score_from - 1 : -1]
        weight = np.array(self.model.model.embed_tokens.weight, dtype=np.float64)
        logits = hidden.astype(np.float64) @ weight.T
        logits[:, self.info.vocab_size :] = -np.inf
        logits[:, list(request.masked_token_ids)] = -np.inf
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        return Scores(**answers(request, logprobs), hidden=hidden if request.wants.hidden else None)

    def _continue(self, request: GenerateRequest) -> list[GeneratedToken]:
        self._refuse_when_unloaded()
        generator = np.random.default_rng(request.seed)
        ids = list(request.prompt_ids)
        tokens: list[GeneratedToken] = []
        while not tokens or not tokens[-1].finish_reason:
            logits = np.array(self.model(mx.array(ids)[None])[0, -1], dtype=np.float64)[: self.info.vocab_size]
            logits[list(request.masked_token_ids)] = -np.inf
            logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            token = int(logprobs.argmax())
            if request.temperature > 0:
                mass = np.exp(logprobs / request.temperature).cumsum()
                token = int(np.searchsorted(mass, generator.random() * mass[-1], side="right"))
            ids.append(token)
            reason = "stop" if token in self.info.eos_token_ids else ""
            reason = reason or ("length" if len(tokens) + 1 == request.max_tokens else "")
            tokens.append(GeneratedToken(token, float(logprobs[token]), finish_reason=reason))
        return tokens


def request_key(request: ScoreRequest) -> str:
    """A digest of everything in a request."""
    candidates = b"" if request.candidate_ids is None else request.candidate_ids.tobytes()
    rest = repr((request.score_from, request.wants, request.masked_token_ids)).encode()
    return hashlib.sha256(request.token_ids.tobytes() + b"|" + candidates + b"|" + rest).hexdigest()


def answers(request: ScoreRequest, logprobs: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Every output but the hidden states, from exact logprobs (rows, V)."""
    wants, found = request.wants, {}
    probabilities = np.exp(logprobs)
    if wants.token_stats:
        actual = np.take_along_axis(logprobs, request.token_ids[request.score_from :, None], -1)
        found["token_logprobs"] = actual[:, 0].astype(np.float32)
        found["ranks"] = (logprobs > actual).sum(-1).astype(np.int32)
        terms = np.where(probabilities > 0, probabilities * np.where(probabilities > 0, logprobs, 0), 0)
        found["entropies"] = -terms.sum(-1).astype(np.float32)
    if wants.top_k:
        ids = np.argsort(-logprobs, axis=-1)[:, : wants.top_k].astype(np.int32)
        found["top_ids"] = ids
        found["top_logprobs"], found["top_tail"] = named(logprobs, ids)
    if request.candidate_ids is not None:
        found["candidate_logprobs"], found["candidate_tail"] = named(logprobs, request.candidate_ids)
    if wants.log_z_temperatures:
        columns = [np.log(np.exp(logprobs / value).sum(-1)) for value in wants.log_z_temperatures]
        found["log_z"] = np.stack(columns, -1).astype(np.float32)
    return found


def named(logprobs: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Logprobs of ids (rows, K) and the log of the mass outside them."""
    places = np.where(ids < 0, ids[:, :1], ids)
    rest = np.exp(logprobs)
    np.put_along_axis(rest, places, 0.0, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(rest.sum(-1))
    chosen = np.where(ids < 0, -np.inf, np.take_along_axis(logprobs, places, -1))
    return chosen.astype(np.float32), tail.astype(np.float32)
