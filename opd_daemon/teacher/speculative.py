"""Speculative decoding: the distilled student drafts a few tokens, the teacher checks them in one forward.

An exclusive job on the engine's thread, as both models have to be in one process. What comes out is what the teacher
alone would have said: at temperature 0 the same tokens, else draws from the same distribution. mlx-lm keeps a drafted
token where the teacher's own draw is the same token; at temperatures above 0 that is rarer than the best rule allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import mlxlm
from opd_daemon.teacher.folder import load_failed
from opd_daemon.teacher.generation import RealVocabulary
from opd_daemon.teacher.loading import LoadedModel, free_memory
from opd_daemon.teacher.memory import is_out_of_memory, out_of_memory
from opd_daemon.teacher.speculation import Speculated, Speculation, SpeculativeToken, check_draft

DRAFT_TOKENS = 3
WARM_UP_TOKENS = 4


class _Cancelled(Exception):
    """Nobody waits for the answer any more."""


def speculate(
    loaded: LoadedModel,
    eos_token_ids: Sequence[int],
    job: Speculation,
    deliver: Callable[[SpeculativeToken], None],
    cancelled: threading.Event,
) -> Speculated:
    """Answer every prompt, one at a time, telling each token; the draft model is freed at the end.

    Raises:
        OpdError: TEACHER_LOAD_FAILED for a draft that can't be loaded, INVALID_REQUEST for a teacher whose cache can't
            take tokens back, OUT_OF_MEMORY, CANCELLED.
    """
    try:
        check_draft(job.base)
        return _Work(loaded, frozenset(eos_token_ids), job, cancelled).run(deliver)
    except _Cancelled:
        raise OpdError(Reason.CANCELLED, "the caller has left") from None
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory("speculative decoding") from error
        raise
    finally:
        free_memory()


class _Work:
    """The two models, and what was counted so far."""

    def __init__(self, loaded: LoadedModel, eos: frozenset[int], job: Speculation, cancelled: threading.Event) -> None:
        caches = mlxlm.module("models.cache")
        if not caches.can_trim_prompt_cache(caches.make_prompt_cache(loaded.model)):
            message = "this teacher's cache can't take tokens back, which speculative decoding needs; leave it out"
            raise OpdError(Reason.INVALID_REQUEST, message)
        model = load_draft(job.base, job.adapter)
        self._job = job
        self._eos = eos
        self._cancelled = cancelled
        self._teacher = RealVocabulary(loaded, job.masked_token_ids)
        self._draft = Draft(model, loaded.vocab_size)
        self._draft_bytes, self._adapter_bytes = _bytes(model.parameters()), _bytes(model.trainable_parameters())
        self._drafted = self._accepted = 0

    def run(self, deliver: Callable[[SpeculativeToken], None]) -> Speculated:
        for _ in self._answer(self._job.prompts[0], WARM_UP_TOKENS):
            pass
        mx.reset_peak_memory()
        self._drafted = self._accepted = tokens = 0
        seconds = 0.0
        for index, prompt in enumerate(self._job.prompts):
            mx.random.seed(self._job.seed + index)
            started = time.perf_counter()
            for token, finish_reason in self._answer(prompt, self._job.max_tokens):
                deliver(SpeculativeToken(index, token, finish_reason))
                tokens += 1
            seconds += time.perf_counter() - started
        peak = mx.get_peak_memory()
        return Speculated(tokens, seconds, self._drafted, self._accepted, self._draft_bytes, self._adapter_bytes, peak)

    def _answer(self, prompt: Sequence[int], max_tokens: int) -> Iterator[tuple[int, str]]:
        steps = mlxlm.module("generate").speculative_generate_step(
            mx.array(tuple(prompt)),
            self._teacher,
            self._draft,
            stream=mx.default_stream(mx.default_device()),
            num_draft_tokens=DRAFT_TOKENS,
            max_tokens=max_tokens,
            sampler=mlxlm.module("sample_utils").make_sampler(temp=self._job.temperature),
        )
        made, checking = 0, False
        with closing(steps):
            for token, _, from_draft in steps:
                if self._cancelled.is_set():
                    raise _Cancelled
                if not checking:  # a round begins: some drafts, which the teacher then checks together
                    self._drafted += min(DRAFT_TOKENS, max_tokens - made)
                made += 1
                self._accepted += from_draft
                checking = from_draft
                stopped = int(token) in self._eos
                yield int(token), "stop" if stopped else "length" if made == max_tokens else ""
                if stopped:
                    return


class Draft:
    """The draft model as the generator sees it: it is fed, and proposes, only ids that both models have."""

    def __init__(self, model: Any, teacher_size: int) -> None:
        self._model = model
        self._teacher_size = teacher_size
        self._size = int(model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T), V at most the teacher's."""
        # An id the draft doesn't know stands for none that it would guess from; any known one does for its context.
        logits: mx.array = self._model(mx.where(tokens < self._size, tokens, 0), cache=cache)
        return logits[..., : self._teacher_size].astype(mx.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def load_draft(base: Path, adapter: Path) -> Any:
    """The student with its adapter; in float32 on a CPU, which multiplies nothing else fast."""
    try:
        model, _ = mlxlm.module("utils").load_model(base, lazy=True)
        if mx.default_device() == mx.Device(mx.cpu):
            model.set_dtype(mx.float32)
        model.freeze()
        mlxlm.module("tuner.utils").load_adapters(model, str(adapter))
        model.eval()
        mx.eval(model.parameters())
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        raise load_failed(base.name, f"it can't be loaded as a draft model: {error}") from error
    return model


def _bytes(tree: Any) -> int:
    weights: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return sum(array.nbytes for _, array in weights)
