"""Scores, completions and the head on the wire. Arrays are packed little-endian, row-major."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.errors import OpdError, Reason, invalid
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import (
    CachedScores,
    GeneratedToken,
    GenerateRequest,
    HiddenDtype,
    ScoreRequest,
    Scores,
    ScoreWants,
    TeacherInfo,
)
from opd_daemon.v1 import teacher_pb2 as pb

BLOCK_BYTES = 1 << 20
INT32 = np.dtype("<i4")
FLOAT32 = np.dtype("<f4")

# Scores field → (ScoredBlock field, element type); `hidden` carries its own type.
_OUTPUTS: dict[str, tuple[str, np.dtype[Any]]] = {
    "token_logprobs": ("token_logprobs", FLOAT32),
    "ranks": ("ranks", INT32),
    "entropies": ("entropies", FLOAT32),
    "top_ids": ("top_ids", INT32),
    "top_logprobs": ("top_logprobs", FLOAT32),
    "top_tail": ("top_tail_logprobs", FLOAT32),
    "candidate_logprobs": ("candidate_logprobs", FLOAT32),
    "candidate_tail": ("candidate_tail_logprobs", FLOAT32),
    "log_z": ("log_z", FLOAT32),
}
_DTYPES: dict[str, tuple[pb.DataType.ValueType, np.dtype[Any]]] = {
    "float32": (pb.DATA_TYPE_FLOAT32, FLOAT32),
    "float16": (pb.DATA_TYPE_FLOAT16, np.dtype("<f2")),
    "bfloat16": (pb.DATA_TYPE_BFLOAT16, np.dtype("<u2")),
    "uint32": (pb.DATA_TYPE_UINT32, np.dtype("<u4")),
    "uint8": (pb.DATA_TYPE_UINT8, np.dtype("u1")),
}
_DTYPE_NAMES = {value: name for name, (value, _) in _DTYPES.items()}


def pack(array: npt.ArrayLike, dtype: np.dtype[Any] = INT32) -> bytes:
    """Little-endian bytes of an array."""
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def unpack(data: bytes, name: str, dtype: np.dtype[Any] = INT32) -> npt.NDArray[Any]:
    """A flat array from its bytes.

    Raises:
        OpdError: INVALID_REQUEST naming `name` when the bytes are no whole number of elements.
    """
    if len(data) % dtype.itemsize:
        raise invalid(name, f"{len(data)} bytes are no whole number of {dtype.itemsize}-byte elements")
    return np.frombuffer(data, dtype=dtype)


def token_input(ids: Sequence[int] | npt.NDArray[np.int32]) -> pb.TokenInput:
    """Token ids as they are sent."""
    return pb.TokenInput(token_ids=pb.TokenIds(ids=pack(ids)))


def outputs_to_proto(wants: ScoreWants) -> pb.LogprobOutputs:
    """What is wanted per position."""
    return pb.LogprobOutputs(
        token_stats=wants.token_stats,
        top_k=wants.top_k or None,
        log_z_temperatures=wants.log_z_temperatures,
        hidden=wants.hidden,
    )


def outputs_from_proto(message: pb.LogprobOutputs) -> ScoreWants:
    """What is wanted per position. An explicit top_k below 1 is refused here, since 0 means "none" elsewhere."""
    if message.HasField("top_k") and message.top_k < 1:
        raise invalid("outputs.top_k", f"{message.top_k} is not a count; use 1 or more, or leave it out for none")
    return ScoreWants(message.token_stats, message.top_k, tuple(message.log_z_temperatures), message.hidden)


def sequence_to_proto(request: ScoreRequest) -> pb.ScoredSequence:
    """One sequence to score; its wants and masked ids are sent once per call."""
    message = pb.ScoredSequence(tokens=token_input(request.token_ids), score_from=request.score_from)
    if request.candidate_ids is not None:
        message.candidate_ids = pack(request.candidate_ids)
        message.candidates = request.candidate_ids.shape[1]
    return message


def candidates_from_proto(message: pb.ScoredSequence, name: str) -> npt.NDArray[np.int32] | None:
    """Candidate ids (rows, candidates), or None; the number of rows is checked with the request."""
    if not message.candidates and not message.candidate_ids:
        return None
    flat = unpack(message.candidate_ids, f"{name}.candidate_ids")
    if message.candidates < 1 or flat.size % message.candidates:
        raise invalid(f"{name}.candidates", f"{flat.size} ids are no whole number of rows of {message.candidates}")
    return flat.reshape(-1, message.candidates)


def score_blocks(index: int, request: ScoreRequest, result: CachedScores) -> Iterator[pb.ScoredBlock]:
    """The rows of one result, in blocks of at most `BLOCK_BYTES`."""
    packed = _packable(result.scores)
    row_bytes = sum(array.itemsize * array[:1].size for _, array in packed) or 1
    rows_per_block = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, request.rows, rows_per_block):
        stop = min(start + rows_per_block, request.rows)
        block = pb.ScoredBlock(
            sequence_index=index, first_position=request.score_from + start, rows=stop - start, cached=result.cached
        )
        for name, array in packed:
            setattr(block, name, array[start:stop].tobytes())
        if result.scores.hidden is not None:
            block.hidden_dtype = _DTYPES[result.scores.hidden_dtype][0]
        if stop == request.rows:
            block.last = True
            block.milliseconds = result.milliseconds
        yield block


def _packable(scores: Scores) -> list[tuple[str, npt.NDArray[Any]]]:
    packed = [
        (wire_name, np.ascontiguousarray(array, dtype=dtype))
        for name, (wire_name, dtype) in _OUTPUTS.items()
        if (array := getattr(scores, name)) is not None
    ]
    if scores.hidden is not None:
        packed.append(("hidden", np.ascontiguousarray(scores.hidden, dtype=_DTYPES[scores.hidden_dtype][1])))
    return packed


@dataclass(slots=True)
class _Parts:
    blocks: list[pb.ScoredBlock] = field(default_factory=list)
    rows: int = 0


class ScoreAssembler:
    """Puts the blocks of a ComputeLogprobs answer together again and checks that each row came exactly once."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self._parts = [_Parts() for _ in requests]

    def add(self, block: pb.ScoredBlock) -> int | None:
        """Take one block; the index of its sequence when that is complete, else None."""
        parts, request = self._parts[block.sequence_index], self._requests[block.sequence_index]
        if block.first_position != request.score_from + parts.rows:
            raise _misplaced(block)
        parts.blocks.append(block)
        parts.rows += block.rows
        return block.sequence_index if block.last else None

    def result(self, index: int) -> CachedScores:
        """The complete result of one sequence."""
        parts, request = self._parts[index], self._requests[index]
        if parts.rows != request.rows:
            raise OpdError(Reason.INTERNAL, f"sequence {index}: {parts.rows} of {request.rows} rows arrived")
        last = parts.blocks[-1]
        return CachedScores(_scores(parts.blocks, request.rows), last.cached, last.milliseconds)

    def results(self) -> list[CachedScores]:
        """All results, in the order of the requests."""
        return [self.result(index) for index in range(len(self._requests))]


def _misplaced(block: pb.ScoredBlock) -> OpdError:
    message = f"sequence {block.sequence_index}: rows from position {block.first_position} came out of place"
    return OpdError(Reason.INTERNAL, message)


def _scores(blocks: list[pb.ScoredBlock], rows: int) -> Scores:
    two_dimensional = {"top_ids", "top_logprobs", "candidate_logprobs", "log_z"}
    outputs: dict[str, Any] = {}
    for name, (wire_name, dtype) in _OUTPUTS.items():
        data = b"".join(getattr(block, wire_name) for block in blocks)
        if data:
            flat = np.frombuffer(data, dtype=dtype)
            outputs[name] = flat.reshape(rows, -1) if name in two_dimensional else flat
    data = b"".join(block.hidden for block in blocks)
    if data:
        hidden_dtype: HiddenDtype = _DTYPE_NAMES[blocks[0].hidden_dtype]  # type: ignore[assignment]
        outputs["hidden"] = np.frombuffer(data, dtype=_DTYPES[hidden_dtype][1]).reshape(rows, -1)
        outputs["hidden_dtype"] = hidden_dtype
    return Scores(**outputs)


def prompt_to_proto(request: GenerateRequest) -> pb.GenerationPrompt:
    """One prompt to continue."""
    return pb.GenerationPrompt(
        tokens=token_input(request.prompt_ids),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        top_logprobs=request.top_logprobs,
        stop_token_ids=request.stop_token_ids,
        masked_token_ids=request.masked_token_ids,
    )


def prompt_from_proto(message: pb.GenerationPrompt, prompt_ids: Sequence[int]) -> GenerateRequest:
    """One prompt to continue, its tokens already turned into ids."""
    return GenerateRequest(
        prompt_ids=tuple(int(token) for token in prompt_ids),
        max_tokens=message.max_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
        top_logprobs=message.top_logprobs,
        stop_token_ids=tuple(message.stop_token_ids),
        masked_token_ids=tuple(message.masked_token_ids),
    )


def generated_block(index: int, tokens: Sequence[GeneratedToken], text: str) -> pb.GeneratedBlock:
    """Consecutive tokens of one prompt."""
    block = pb.GeneratedBlock(
        prompt_index=index,
        tokens=len(tokens),
        token_ids=pack([token.token_id for token in tokens]),
        token_logprobs=pack([token.logprob for token in tokens], FLOAT32),
        text=text,
        cached=any(token.cached for token in tokens),
    )
    if tokens and tokens[0].top_ids is not None:
        block.top_ids = pack(np.stack([token.top_ids for token in tokens if token.top_ids is not None]))
        logprobs = [token.top_logprobs for token in tokens if token.top_logprobs is not None]
        block.top_logprobs = pack(np.stack(logprobs), FLOAT32)
    if tokens and tokens[-1].finish_reason:
        block.finish_reason = pb.FinishReason.Value(f"FINISH_REASON_{tokens[-1].finish_reason.upper()}")
    return block


def tokens_from_block(block: pb.GeneratedBlock) -> list[GeneratedToken]:
    """The tokens of a block; the finish reason is on the last one."""
    ids = np.frombuffer(block.token_ids, dtype=INT32)
    logprobs = np.frombuffer(block.token_logprobs, dtype=FLOAT32)
    top_ids = np.frombuffer(block.top_ids, dtype=INT32).reshape(len(ids), -1) if block.top_ids else None
    top_logprobs = np.frombuffer(block.top_logprobs, dtype=FLOAT32).reshape(len(ids), -1) if block.top_ids else None
    reasons = [""] * len(ids)
    if block.finish_reason and len(ids):
        reasons[-1] = pb.FinishReason.Name(block.finish_reason).removeprefix("FINISH_REASON_").lower()
    return [
        GeneratedToken(
            int(ids[row]),
            float(logprobs[row]),
            None if top_ids is None else top_ids[row],
            None if top_logprobs is None else top_logprobs[row],
            reasons[row],
            block.cached,
        )
        for row in range(len(ids))
    ]


def head_facts(head: TeacherHead, info: TeacherInfo) -> pb.HeadFacts:
    """What is known of a head before its tensors."""
    return pb.HeadFacts(
        padded_vocab_size=info.padded_vocab_size,
        hidden_size=info.hidden_size,
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
        logit_scale=head.logit_scale,
        soft_cap=head.soft_cap,
    )


def head_pieces(head: TeacherHead) -> Iterator[pb.HeadPiece]:
    """The tensors of a head, one after another, in pieces of `BLOCK_BYTES`."""
    for name, tensor in head.tensors.items():
        dtype, layout = _DTYPES[head.dtypes[name]]
        data = np.ascontiguousarray(tensor, dtype=layout).reshape(-1).view(np.uint8)
        for offset in range(0, data.size, BLOCK_BYTES):
            piece = data[offset : offset + BLOCK_BYTES].tobytes()
            yield pb.HeadPiece(name=name, dtype=dtype, shape=tensor.shape, offset=offset, data=piece)


def head_from_pieces(facts: pb.HeadFacts, pieces: Iterator[pb.HeadPiece]) -> TeacherHead:
    """A head put together again."""
    buffers: dict[str, npt.NDArray[Any]] = {}
    dtypes: dict[str, str] = {}
    for piece in pieces:
        if piece.name not in buffers:
            dtypes[piece.name] = _DTYPE_NAMES[piece.dtype]
            buffers[piece.name] = np.empty(tuple(piece.shape), dtype=_DTYPES[dtypes[piece.name]][1])
        target = buffers[piece.name].reshape(-1).view(np.uint8)
        target[piece.offset : piece.offset + len(piece.data)] = np.frombuffer(piece.data, dtype=np.uint8)
    finish = {"logit_scale": facts.logit_scale or 1.0, "soft_cap": facts.soft_cap}
    return TeacherHead(buffers, dtypes, facts.group_size, facts.bits, facts.mode or "affine", **finish)
