"""Continuous batching over mlx-lm's BatchGenerator: sequences join and leave while others decode."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import mlxlm
from opd_daemon.teacher.batching import GenerationItem, Places, joining
from opd_daemon.teacher.distribution import describe
from opd_daemon.teacher.fair_queue import FairQueue
from opd_daemon.teacher.loading import LoadedModel
from opd_daemon.types import GeneratedToken, GenerateRequest, ScoreWants

# At once, and of one client: the rest is kept for whoever comes while one has taken all it may. Where reading the
# weights is what takes time, a round of 8 takes hardly longer than one of a single sequence.
DECODING_SEQUENCES = 36
SEQUENCES_OF_ONE_CLIENT, SEQUENCES_BESIDE_OTHERS = 32, 8
PREFILL_SEQUENCES, PREFILL_OF_ONE_CLIENT = 8, 7
# Tokens of prompts in one round, in pieces of a scoring pass: alone, and while several clients want the teacher.
ROUND_PIECES, CONTENDED_ROUND_PIECES = 4, 1 / 4
# Logits divided by a lower temperature may leave float32.
COLDEST = 1e-6

Sampler = Callable[[mx.array], mx.array]


class Generation:
    """The sequences being generated. Used by the engine's thread only."""

    def __init__(self, loaded: LoadedModel, eos_token_ids: Sequence[int], piece: int) -> None:
        self._loaded = loaded
        self._eos = frozenset(eos_token_ids)
        self._piece = piece
        self._round = ROUND_PIECES * piece
        self._contended_round = max(1, round(CONTENDED_ROUND_PIECES * piece))
        self._places = Places(
            most=DECODING_SEQUENCES,
            alone=SEQUENCES_OF_ONE_CLIENT,
            contended=SEQUENCES_BESIDE_OTHERS,
            prefilled=PREFILL_SEQUENCES,
            prefilled_of_one=PREFILL_OF_ONE_CLIENT,
            contended_tokens=self._contended_round,
        )
        self._active: dict[int, GenerationItem] = {}
        self._prefilling: dict[int, GenerationItem] = {}

    def __len__(self) -> int:
        return len(self._active)

    @property
    def clients(self) -> set[str]:
        """Whose sequences are being generated."""
        return {item.client for item in self._active.values()}

    def joining(self, waiting: FairQueue[GenerationItem], *, contended: bool) -> list[GenerationItem]:
        """Which of the waiting prompts may join now. contended: several clients want the teacher."""
        active, prefilling = self._active.values(), self._prefilling.values()
        return joining(waiting, active, prefilling, self._places, contended=contended)

    @cached_property
    def _batches(self) -> Any:
        return mlxlm.module("generate").BatchGenerator(
            RealVocabulary(self._loaded),
            completion_batch_size=DECODING_SEQUENCES,
            prefill_batch_size=PREFILL_SEQUENCES,
            prefill_step_size=self._piece,
            stream=mx.default_stream(mx.default_device()),
        )

    def add(self, items: Sequence[GenerationItem]) -> None:
        """Let sequences join."""
        uids = self._batches.insert(
            [list(item.request.prompt_ids) for item in items],
            max_tokens=[item.request.max_tokens for item in items],
            samplers=[sampler(item.request) for item in items],
        )
        added = dict(zip(uids, items, strict=True))
        self._active |= added
        self._prefilling |= added

    def step(self, *, contended: bool) -> int:
        """One round: every decoding sequence gets a token, waiting prompts a piece of prefill; how many tokens.

        contended: several clients want the teacher, so the round is to be short.
        """
        started = time.perf_counter()
        self._remove([uid for uid, item in self._active.items() if item.cancelled])
        working = list(self._active.values())
        if not working:
            return 0
        tokens = self._contended_round if contended else self._round
        self._batches.prefill_step_size = min(self._piece, max(1, tokens // max(1, len(self._prefilling))))
        prompts, responses = self._batches.next()
        for prompt in prompts:
            if prompt.end_of_prompt:
                self._prefilling.pop(prompt.uid, None)
        found = self._tokens(responses) if responses else []
        share = 1000 * (time.perf_counter() - started) / len(working)
        for item in working:
            item.milliseconds += share
        for response, token in zip(responses, found, strict=True):
            self._deliver(response, token)
        return len(found)

    def fail(self, error: OpdError) -> None:
        """End every sequence with `error` and start afresh."""
        failed, self._active, self._prefilling = list(self._active.values()), {}, {}
        self.__dict__.pop("_batches", None)
        for item in failed:
            item.deliver(error)

    def _tokens(self, responses: Sequence[Any]) -> list[GeneratedToken]:
        """Tokens with their log-probabilities; only these few numbers of the V per sequence are kept."""
        items = [self._active[response.uid] for response in responses]
        ids = np.array([response.token for response in responses], np.int32)
        wants = ScoreWants(top_k=max(item.request.top_logprobs for item in items))
        rows = mx.stack([response.logprobs for response in responses])
        found = describe(rows, ids, np.zeros((len(ids), 0), np.int32), wants, ())
        if not np.isfinite(found["log_total"]).all():
            raise OpdError(Reason.NOT_A_NUMBER, "the teacher's output is not a number; its weights are damaged")
        return [
            self._token(item, row, response, found)
            for row, (item, response) in enumerate(zip(items, responses, strict=True))
        ]

    def _token(self, item: GenerationItem, row: int, response: Any, found: dict[str, Any]) -> GeneratedToken:
        count = item.request.top_logprobs
        stopped = response.token in self._eos or response.token in item.stops
        return GeneratedToken(
            token_id=int(response.token),
            logprob=float(found["token_logprobs"][row]),
            top_ids=found["top_ids"][row, :count].copy() if count else None,
            top_logprobs=found["top_logprobs"][row, :count].copy() if count else None,
            finish_reason="stop" if stopped else response.finish_reason or "",
        )

    def _deliver(self, response: Any, token: GeneratedToken) -> None:
        item = self._active[response.uid]
        if token.finish_reason:
            del self._active[response.uid]
            if not response.finish_reason:
                self._batches.remove([response.uid])
        item.deliver(token)

    def _remove(self, uids: list[int]) -> None:
        if uids:
            self._batches.remove(uids)
        for uid in uids:
            del self._active[uid]
            self._prefilling.pop(uid, None)


class RealVocabulary:
    """The model as mlx-lm's generators see it: float32 logits, of ids that are tokens, everything else unchanged.

    masked_token_ids: get no mass.
    """

    def __init__(self, loaded: LoadedModel, masked_token_ids: tuple[int, ...] = ()) -> None:
        self._model = loaded.model
        self._decoder = loaded.decoder
        self._size = loaded.vocab_size
        self._masked = mx.array(masked_token_ids, dtype=mx.int32) if masked_token_ids else None

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T)."""
        logits = self._decoder(tokens, cache)
        logits = logits[..., : self._size].astype(mx.float32)
        if self._masked is not None:
            logits[..., self._masked] = -mx.inf
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def sampler(request: GenerateRequest) -> Sampler:
    """Chooses the next token of a sequence, never a masked one."""
    choose = chooser(request)
    if not request.masked_token_ids:
        return choose
    masked = mx.array(request.masked_token_ids, dtype=mx.int32)[None]

    def sample(logprobs: mx.array) -> mx.array:
        places = mx.broadcast_to(masked, (len(logprobs), masked.shape[1]))
        return choose(mx.put_along_axis(logprobs, places, mx.array(-mx.inf), -1))

    return sample


def chooser(request: GenerateRequest) -> Sampler:
    """Greedy at temperature 0; else samples at the temperature from the nucleus of mass top_p.

    A temperature so near 0 that float32 can't divide by it is 0. Each sequence has its own chain of random keys, so
    what else is in the batch changes nothing.
    """
    if request.temperature < COLDEST:
        return greedy
    key = mx.random.key(secrets.randbits(63) if request.seed is None else request.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        scaled = logprobs / request.temperature
        if request.top_p < 1:
            scaled = nucleus(scaled, request.top_p)
        return mx.random.categorical(scaled, key=now)

    return sample


def nucleus(logits: mx.array, top_p: float) -> mx.array:
    """Logits (B, V) with −inf outside the fewest most likely tokens whose mass reaches `top_p`."""
    order = mx.argsort(-logits, axis=-1)
    masses = mx.take_along_axis(mx.softmax(logits, axis=-1), order, -1)
    kept = mx.cumsum(masses, axis=-1) - masses < top_p
    return mx.where(mx.put_along_axis(mx.zeros_like(kept), order, kept, -1), logits, -mx.inf)


def greedy(logprobs: mx.array) -> mx.array:
    """The most likely token."""
    return mx.argmax(logprobs, axis=-1)
