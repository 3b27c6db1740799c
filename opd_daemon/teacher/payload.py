"""Cache entries of teacher results: the address of a result by everything that determines it, and its stored form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opd_daemon.types import GeneratedToken, GenerateRequest, HiddenDtype, ScoreRequest, Scores, TeacherInfo

# Part of every address: raise it whenever results or their form change, and old entries are never read again.
FORMAT = 1

SCORE_DTYPES: dict[str, str] = {"ranks": "int32", "top_ids": "int32"}
HIDDEN_STORAGE: dict[str, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Arrays and facts of one result; `milliseconds` is what computing it took."""

    arrays: dict[str, npt.NDArray[Any]]
    milliseconds: float
    facts: dict[str, str]

    def encoded(self) -> bytes:
        """As safetensors, the facts in their metadata."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return save(arrays, {**self.facts, "milliseconds": repr(float(self.milliseconds))})

    @classmethod
    def decoded(cls, payload: bytes) -> Self:
        """The entry again. Raises ValueError for bytes that are none."""
        length = int.from_bytes(payload[:8], "little")
        facts = dict(json.loads(payload[8 : 8 + length]).get("__metadata__", {}))
        milliseconds = float(facts.pop("milliseconds", "nan"))
        if not milliseconds >= 0:
            raise ValueError("it doesn't say what it took")
        try:
            return cls(load(payload), milliseconds, facts)
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def score_key(info: TeacherInfo, request: ScoreRequest) -> str:
    """Address of the scores of one request, hexadecimal."""
    settings = {"kind": "scores", "score_from": request.score_from, "wants": asdict(request.wants)}
    arrays = [request.token_ids, np.asarray(sorted(set(request.masked_token_ids)), np.int32)]
    if request.candidate_ids is not None:
        arrays.append(request.candidate_ids)
    return _address(info, settings, arrays)


def generation_key(info: TeacherInfo, request: GenerateRequest) -> str:
    """Address of one completion, hexadecimal."""
    return _address(info, {"kind": "generation", **asdict(request)}, [])


def repeatable(request: GenerateRequest) -> bool:
    """Whether the same request always means the same completion."""
    return request.temperature == 0 or request.seed is not None


def scores_entry(scores: Scores, milliseconds: float) -> Entry:
    """Stored form of scores."""
    return Entry(scores.arrays(), milliseconds, {"hidden_dtype": scores.hidden_dtype})


def entry_scores(entry: Entry, request: ScoreRequest) -> Scores:
    """Scores from their stored form. Raises ValueError unless it holds exactly what `request` asks for."""
    dtype = entry.facts.get("hidden_dtype", "")
    if dtype not in HIDDEN_STORAGE:
        raise ValueError(f"unknown hidden dtype {dtype!r}")
    _check(entry.arrays, _score_shapes(request), SCORE_DTYPES | {"hidden": HIDDEN_STORAGE[dtype]})
    return Scores(**entry.arrays, hidden_dtype=cast(HiddenDtype, dtype))


def tokens_entry(tokens: Sequence[GeneratedToken], milliseconds: float) -> Entry:
    """Stored form of a completion."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "token_ids": np.array([token.token_id for token in tokens], np.int32),
        "logprobs": np.array([token.logprob for token in tokens], np.float32),
    }
    if tokens[0].top_ids is not None:
        arrays["top_ids"] = np.stack([cast(Any, token.top_ids) for token in tokens])
        arrays["top_logprobs"] = np.stack([cast(Any, token.top_logprobs) for token in tokens])
    return Entry(arrays, milliseconds, {"finish_reason": tokens[-1].finish_reason})


def entry_tokens(entry: Entry, request: GenerateRequest) -> list[GeneratedToken]:
    """A completion from its stored form. Raises ValueError unless it fits `request`."""
    count = len(entry.arrays.get("token_ids", ()))
    if not 1 <= count <= request.max_tokens or not entry.facts.get("finish_reason"):
        raise ValueError(f"a completion of {count} tokens that doesn't end")
    shapes: dict[str, tuple[int, ...]] = {"token_ids": (count,), "logprobs": (count,)}
    if request.top_logprobs:
        shapes |= {"top_ids": (count, request.top_logprobs), "top_logprobs": (count, request.top_logprobs)}
    _check(entry.arrays, shapes, {"token_ids": "int32", "top_ids": "int32"})
    return [_token(entry, index, index == count - 1) for index in range(count)]


def _token(entry: Entry, index: int, last: bool) -> GeneratedToken:
    arrays = entry.arrays
    return GeneratedToken(
        token_id=int(arrays["token_ids"][index]),
        logprob=float(arrays["logprobs"][index]),
        top_ids=arrays["top_ids"][index] if "top_ids" in arrays else None,
        top_logprobs=arrays["top_logprobs"][index] if "top_logprobs" in arrays else None,
        finish_reason=entry.facts["finish_reason"] if last else "",
        cached=True,
    )


def _score_shapes(request: ScoreRequest) -> dict[str, tuple[int, ...]]:
    rows, wants = request.rows, request.wants
    shapes: dict[str, tuple[int, ...]] = {}
    if wants.token_stats:
        shapes |= dict.fromkeys(("token_logprobs", "ranks", "entropies"), (rows,))
    if wants.top_k:
        shapes |= {"top_ids": (rows, wants.top_k), "top_logprobs": (rows, wants.top_k), "top_tail": (rows,)}
    if request.candidate_ids is not None:
        shapes |= {"candidate_logprobs": request.candidate_ids.shape, "candidate_tail": (rows,)}
    if wants.log_z_temperatures:
        shapes["log_z"] = (rows, len(wants.log_z_temperatures))
    if wants.hidden:
        shapes["hidden"] = (rows, -1)
    return shapes


def _check(arrays: dict[str, npt.NDArray[Any]], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> None:
    if arrays.keys() != shapes.keys():
        raise ValueError(f"holds {sorted(arrays)} instead of {sorted(shapes)}")
    for name, shape in shapes.items():
        found = arrays[name]
        fits = found.ndim == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, found.shape, strict=True)
        )
        if not fits or found.dtype != dtypes.get(name, "float32"):
            raise ValueError(f"{name} is {found.dtype} {found.shape} instead of {shape}")


def _address(info: TeacherInfo, settings: dict[str, Any], arrays: Sequence[npt.NDArray[np.int32]]) -> str:
    header = {"format": FORMAT, "teacher": info.digest, "tokenizer": info.tokenizer_digest, **settings}
    value = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for array in arrays:
        value.update(str(array.shape).encode())
        value.update(np.ascontiguousarray(array, "<i4").tobytes())
    return value.hexdigest()
