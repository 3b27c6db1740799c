"""Batched decoding: many continuations at once, one forward per token for all of them.

mlx-lm's own batched caches hold the keys and values. Sampling is one pass over the logits `(B, V)`: the chosen ids,
their log-probabilities and the most likely ids all come from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from opd_daemon.arrays import Float32, Int32
from opd_daemon.distill.logits import IMPOSSIBLE, logsumexp, on_host, top_ids

if TYPE_CHECKING:
    from opd_daemon.distill.student import Student

Stopped = Literal["stop", "length", "repetition"]

PREFILL_TOKENS = 4096
BLOCK = 256
LARGEST_UNIFORM = 1.0 - 2.0**-24


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; support: number of most likely ids recorded per token.

    repetition_guard: a completion that says the same thing this many times in a row is ended; 0 lets it go on.
    """

    max_tokens: int
    temperature: float
    support: int = 0
    repetition_guard: int = 0


@dataclass(slots=True)
class Continuation:
    """What is decoded behind one prompt. logprobs: at temperature 1. support: `(K,)` per token, where recorded.

    uniforms (max_tokens,): random numbers in [0, 1) of its own; not looked at when greedy.
    """

    prompt: tuple[int, ...]
    uniforms: npt.NDArray[np.float64]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support: list[Int32] = field(default_factory=list)
    stopped: Stopped | None = None


def decode(student: Student, rows: Sequence[Continuation], sampling: Sampling) -> None:
    """Continue every row to its end, all together; equal prompts are prefilled once."""
    size = student.largest_batch if _batches(student.model) else 1
    for start in range(0, len(rows), size):
        _decode_batch(student, rows[start : start + size], sampling)


def _decode_batch(student: Student, rows: Sequence[Continuation], sampling: Sampling) -> None:
    cache = _prefill(student.model, [row.prompt for row in rows])
    inputs = [row.prompt[-1] for row in rows]
    while rows:
        tokens = mx.array(inputs, dtype=mx.int32)[:, None]
        _append(rows, student.vocabulary(student.decoder(tokens, cache)[:, -1]), student, sampling)
        keep = [place for place, row in enumerate(rows) if row.stopped is None]
        if 0 < len(keep) < len(rows):
            for entry in cache:
                entry.filter(keep)
        rows = [rows[place] for place in keep]
        inputs = [row.token_ids[-1] for row in rows]


def _append(rows: Sequence[Continuation], logits: mx.array, student: Student, sampling: Sampling) -> None:
    """Sample a token for every row from its masked logits `(B, V)`."""
    uniforms = np.array([row.uniforms[len(row.token_ids)] for row in rows])
    ids, logprobs = sample(logits, sampling.temperature, uniforms)
    support = np.array(top_ids(logits, min(sampling.support, student.vocab_size))) if sampling.support else None
    for place, row in enumerate(rows):
        row.token_ids.append(int(ids[place]))
        row.logprobs.append(float(logprobs[place]))
        if support is not None:
            row.support.append(support[place])
        row.stopped = _stopped(row, student, sampling)


def _stopped(row: Continuation, student: Student, sampling: Sampling) -> Stopped | None:
    if row.token_ids[-1] in student.eos_ids:
        return "stop"
    if len(row.token_ids) == sampling.max_tokens:
        return "length"
    if sampling.repetition_guard and repeats(row.token_ids, sampling.repetition_guard):
        return "repetition"
    return None


def sample(logits: mx.array, temperature: float, uniforms: npt.NDArray[np.float64]) -> tuple[Int32, Float32]:
    """Ids `(B,)` drawn from masked logits `(B, V)` by uniform numbers `(B,)`, and their logprobs at temperature 1.

    The mass is summed in blocks, then inside the block the number fell into: exact enough in float32 for any
    vocabulary, and much less work than noise for every id.
    """
    if on_host():
        return _sample_host(np.asarray(logits), temperature, uniforms)
    return _sample_device(logits, temperature, mx.array(np.minimum(uniforms, LARGEST_UNIFORM), dtype=mx.float32))


def _sample_host(logits: Float32, temperature: float, uniforms: npt.NDArray[np.float64]) -> tuple[Int32, Float32]:
    ids = np.empty(len(logits), dtype=np.int32)
    logprobs = np.empty(len(logits), dtype=np.float32)
    for place, row in enumerate(logits):
        shifted = row - row.max()
        weights = np.exp(shifted)
        if temperature == 0:
            ids[place] = row.argmax()
        else:
            chosen = weights if temperature == 1 else np.exp(shifted * np.float32(1.0 / temperature))
            ids[place] = _invert(chosen, uniforms[place])
        logprobs[place] = shifted[ids[place]] - np.log(weights.sum())
    return ids, logprobs


def _invert(weights: Float32, uniform: float) -> int:
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    rest = min(target - (sums[block - 1] if block else 0.0), inside[-1] * LARGEST_UNIFORM)
    return block * BLOCK + int(np.searchsorted(inside, rest, side="right"))


def _sample_device(logits: mx.array, temperature: float, uniforms: mx.array) -> tuple[Int32, Float32]:
    if temperature == 0:
        ids = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        scaled = logits * (1.0 / temperature)
        lacking = -logits.shape[-1] % BLOCK
        padded = mx.pad(scaled, [(0, 0), (0, lacking)], constant_values=IMPOSSIBLE)
        weights = mx.exp(padded - padded.max(axis=-1, keepdims=True)).reshape(len(logits), -1, BLOCK)
        sums = weights.sum(axis=-1).cumsum(axis=-1)
        target = uniforms[:, None] * sums[:, -1:]
        block = (sums <= target).sum(axis=-1, keepdims=True)
        before = mx.where(block > 0, mx.take_along_axis(sums, mx.maximum(block - 1, 0), axis=-1), 0.0)
        inside = mx.take_along_axis(weights, block[:, :, None], axis=1)[:, 0].cumsum(axis=-1)
        rest = mx.minimum(target - before, inside[:, -1:] * LARGEST_UNIFORM)
        ids = block * BLOCK + (inside <= rest).sum(axis=-1, keepdims=True)
    logprobs = mx.take_along_axis(logits, ids, axis=-1) - logsumexp(logits)
    return np.array(ids[:, 0], dtype=np.int32), np.array(logprobs[:, 0])


def repeats(token_ids: Sequence[int], times: int, longest: int = 64) -> bool:
    """Whether the last tokens are one phrase of up to `longest` tokens, said `times` times in a row or more.

    A phrase counts only once its repetitions fill 16 tokens, so that "ha ha ha" and rows of zeros may be said.
    """
    size = len(token_ids)
    for period in range(1, longest + 1):
        span = period * max(times, -(-16 // period))
        if span > size:
            if period * times > size:
                return False
            continue
        tail = token_ids[size - span :]
        if tail[period:] == tail[:-period]:
            return True
    return False


def _batches(model: Any) -> bool:
    """Whether the model's caches can hold several sequences; quantised and chunked ones can't."""
    return all(hasattr(entry, "merge") for entry in make_prompt_cache(model))


def _prefill(model: Any, prompts: Sequence[tuple[int, ...]]) -> list[Any]:
    """Caches with a row per prompt, holding all its tokens but the last."""
    unique = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    cache: list[Any] = make_prompt_cache(model)
    if len(prompts) > 1:
        cache = [entry.merge([entry] * len(unique)) for entry in cache]
    for chunk in _chunks([prompt[:-1] for prompt in unique], cache):
        model(chunk, cache=cache)
        mx.eval([entry.state for entry in cache])
    if len(unique) < len(prompts):
        places = [unique[prompt] for prompt in prompts]
        for entry in cache:
            entry.filter(places)
    return cache


def _chunks(prefixes: Sequence[tuple[int, ...]], cache: list[Any]) -> Iterator[mx.array]:
    longest = max(len(prefix) for prefix in prefixes)
    lengths = [len(prefix) for prefix in prefixes]
    padding = [longest - length for length in lengths]
    tokens = np.zeros((len(prefixes), longest), dtype=np.int32)
    for place, prefix in enumerate(prefixes):
        tokens[place, : len(prefix)] = prefix
    if any(padding):
        for entry in cache:
            entry.prepare(lengths=lengths, right_padding=padding)
    width = max(1, PREFILL_TOKENS // len(prefixes))
    for start in range(0, longest, width):
        yield mx.array(tokens[:, start : start + width])
    if any(padding):
        for entry in cache:
            entry.finalize()
