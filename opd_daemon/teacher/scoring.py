"""Scores of one batch of sequences, from one prefill in pieces; a prompt they share is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Int32
from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher import mlxlm
from opd_daemon.teacher.batching import LENGTH_SLACK, LENGTH_SPREAD
from opd_daemon.teacher.distribution import Arrays, describe
from opd_daemon.teacher.sharing import fork, shared_prefix
from opd_daemon.types import HiddenDtype, ScoreRequest, Scores, ScoreWants

if TYPE_CHECKING:
    from opd_daemon.models.split import SplitModel
    from opd_daemon.teacher.loading import LoadedModel

# One chunk of float32 logits.
CHUNK_BYTES = 64 << 20
# Logits of one piece, for models whose body gives logits at every position.
WHOLE_PIECE_BYTES = 256 << 20
# Positions, prefix included, that the rows of one forward may look back on: one layer's keys and values of all of them
# exist together, 256 MiB in a 32B model.
ATTENDED_POSITIONS = 1 << 16
HIDDEN_DTYPES: dict[mx.Dtype, HiddenDtype] = {
    mx.float32: "float32",
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What rows must have in common to be answered together."""

    wants: ScoreWants
    candidates: int
    masked: tuple[int, ...]

    @property
    def needs_logits(self) -> bool:
        """Whether states alone don't answer it."""
        wants = self.wants
        return bool(wants.token_stats or wants.top_k or wants.log_z_temperatures or self.candidates)

    @classmethod
    def of(cls, request: ScoreRequest) -> Recipe:
        """The recipe of one request."""
        columns = 0 if request.candidate_ids is None else request.candidate_ids.shape[1]
        return cls(request.wants, columns, request.masked_token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSequence:
    """One request of a batch; `parts` collects its answers piece by piece."""

    request: ScoreRequest
    parts: list[Arrays] = field(default_factory=list)

    @property
    def inputs(self) -> Int32:
        """The tokens that are computed; the last one predicts nothing that is asked for."""
        return self.request.token_ids[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Input positions first … last−1 of one sequence, in one row: their states predict tokens first+1 … last."""

    sequence: ScoredSequence
    row: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def ids(self) -> Int32:
        """The tokens predicted here (n,)."""
        return self.sequence.request.token_ids[self.first + 1 : self.last + 1]

    @property
    def candidates(self) -> Int32:
        """The caller's ids here (n, C); none as (n, 0)."""
        ids, shift = self.sequence.request.candidate_ids, 1 - self.sequence.request.score_from
        return np.zeros((len(self), 0), np.int32) if ids is None else ids[self.first + shift : self.last + shift]


def score_batch(
    loaded: LoadedModel, requests: Sequence[ScoreRequest], piece: int
) -> Generator[None, None, list[Scores | OpdError]]:
    """Score valid requests together; pauses after every `piece` positions so that other work gets its turn.

    What all sequences begin with is computed once, where that pays. Returns one result per request, an error where
    the model's output was not a number.
    """
    sequences = [ScoredSequence(request) for request in requests]
    prefix = shared_prefix([sequence.inputs for sequence in sequences]) if loaded.shares_prefixes else 0
    if prefix:
        yield from _score_sharing(loaded, sequences, prefix, piece)
    else:
        tokens = _padded(sequences, 0)
        cache = _new_cache(loaded) if tokens.shape[1] > _bounded(piece, loaded.parts, len(tokens)) else None
        yield from _score_rows(loaded, list(enumerate(sequences)), tokens, offset=0, cache=cache, piece=piece)
    return [_scores(sequence.parts, loaded.parts.dtype) for sequence in sequences]


def _score_sharing(
    loaded: LoadedModel, sequences: Sequence[ScoredSequence], prefix: int, piece: int
) -> Generator[None, None, None]:
    """Score sequences with `prefix` tokens in common: those once, then what follows, in rows of about one length."""
    cache = _new_cache(loaded)
    everyone = [(0, sequence) for sequence in sequences]
    common = sequences[0].inputs[None, :prefix]
    yield from _score_rows(loaded, everyone, common, offset=0, cache=cache, piece=piece)
    for group in _alike(sequences, prefix):
        tokens = _padded(group, prefix)
        keep = tokens.shape[1] > _bounded(piece, loaded.parts, len(group))
        forked = fork(cache, len(group), keep=keep)
        yield from _score_rows(loaded, list(enumerate(group)), tokens, offset=prefix, cache=forked, piece=piece)


def _alike(sequences: Sequence[ScoredSequence], prefix: int) -> Iterator[list[ScoredSequence]]:
    """The sequences that go on behind the prefix, longest first, in groups that waste little on padding."""
    waiting = sorted(sequences, key=lambda sequence: -len(sequence.inputs))
    while waiting and len(waiting[0].inputs) > prefix:
        longest = len(waiting[0].inputs)
        most = max(1, ATTENDED_POSITIONS // longest)
        count, used = 0, 0
        for sequence in waiting[:most]:
            used += len(sequence.inputs) - prefix
            wasted = (count + 1) * (longest - prefix) - used
            if len(sequence.inputs) == prefix or wasted > max(LENGTH_SLACK, LENGTH_SPREAD * used):
                break
            count += 1
        yield waiting[:count]
        waiting = waiting[count:]


def _score_rows(
    loaded: LoadedModel,
    rows: Sequence[tuple[int, ScoredSequence]],
    tokens: Int32,
    *,
    offset: int,
    cache: Sequence[Any] | None,
    piece: int,
) -> Generator[None, None, None]:
    """Compute tokens (B, T), which begin at position `offset`, and answer the sequences that lie in the rows.

    Rows are padded on the right, which a causal model can't see.
    """
    width = tokens.shape[1]
    piece = _bounded(piece, loaded.parts, len(tokens))
    for start in range(0, width, piece):
        stop = min(start + piece, width)
        states = loaded.parts.body(mx.array(tokens[:, start:stop]), cache)
        for recipe, spans in _spans(rows, offset + start, offset + stop).items():
            _answer_spans(loaded, recipe, spans, states, offset + start)
        if cache is not None:
            mx.eval([entry.state for entry in cache])
        yield


def _new_cache(loaded: LoadedModel) -> list[Any]:
    cache: list[Any] = mlxlm.module("models.cache").make_prompt_cache(loaded.model)
    return cache


def _padded(sequences: Sequence[ScoredSequence], offset: int) -> Int32:
    """Input tokens from `offset` on (B, T)."""
    rows = [sequence.inputs[offset:] for sequence in sequences]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens


def _bounded(piece: int, parts: SplitModel, rows: int) -> int:
    return max(1, min(piece, WHOLE_PIECE_BYTES // (4 * parts.width * rows))) if parts.refusal else piece


def _spans(rows: Sequence[tuple[int, ScoredSequence]], start: int, stop: int) -> dict[Recipe, list[Span]]:
    groups: dict[Recipe, list[Span]] = defaultdict(list)
    for row, sequence in rows:
        request = sequence.request
        first, last = max(start, request.score_from - 1), min(stop, len(sequence.inputs))
        if first < last:
            groups[Recipe.of(request)].append(Span(sequence, row, first, last))
    return groups


def _answer_spans(loaded: LoadedModel, recipe: Recipe, spans: list[Span], states: mx.array, start: int) -> None:
    """Answer one recipe for all its rows of this piece, and hand each sequence its part."""
    places = [span.row * states.shape[1] + np.arange(span.first, span.last) - start for span in spans]
    rows = states.reshape(-1, states.shape[-1])[mx.array(np.concatenate(places))]
    if recipe.needs_logits:
        ids = np.concatenate([span.ids for span in spans])
        candidates = np.concatenate([span.candidates for span in spans])
        answers = _answer_rows(loaded, recipe, rows, ids, candidates)
    else:
        # In place of log Z for the check: no number wherever the states are none.
        answers = {"log_total": np.array(rows.astype(mx.float32).sum(-1))}
    if recipe.wants.hidden:
        answers["hidden"] = _host_hidden(rows)
    offset = 0
    for span in spans:
        span.sequence.parts.append({name: values[offset : offset + len(span)] for name, values in answers.items()})
        offset += len(span)


def _answer_rows(loaded: LoadedModel, recipe: Recipe, rows: mx.array, ids: Int32, candidates: Int32) -> Arrays:
    """Run the head and the distribution over rows (N, D), a bounded number at a time."""
    chunk = max(1, CHUNK_BYTES // (4 * loaded.parts.width))
    answers = []
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        logits = loaded.parts.head(rows[part])[:, : loaded.vocab_size].astype(mx.float32)
        answers.append(describe(logits, ids[part], candidates[part], recipe.wants, recipe.masked))
    return _joined(answers)


def _host_hidden(rows: mx.array) -> npt.NDArray[Any]:
    """States as numpy; numpy knows no bfloat16, so its bit patterns travel as uint16."""
    return np.array(rows.view(mx.uint16) if rows.dtype == mx.bfloat16 else rows)


def _scores(parts: list[Arrays], dtype: mx.Dtype) -> Scores | OpdError:
    arrays = _joined(parts)
    if not np.isfinite(arrays.pop("log_total")).all():
        return OpdError(
            Reason.NOT_A_NUMBER,
            "the teacher's output is not a number for this sequence; its weights are damaged or overflow their type",
        )
    return Scores(**arrays, hidden_dtype=HIDDEN_DTYPES[dtype] if "hidden" in arrays else "float32")


def _joined(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
