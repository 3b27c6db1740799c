"""Checks of requests before anything is queued: one violation per fault, by its path in the request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opd_daemon.arrays import Int32
from opd_daemon.errors import FieldViolation, OpdError, Reason, violations_error
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants, TeacherInfo

MAX_SEED = 2**32 - 1
MOST_ALTERNATIVES = 1024
# Of one call: looking at more would hold up everybody else.
MOST_SEQUENCES = 16_384
MOST_TEMPERATURES = 64


def check_scores(requests: Sequence[ScoreRequest], info: TeacherInfo) -> None:
    """Raise INVALID_REQUEST naming every fault, or HIDDEN_NOT_SUPPORTED."""
    faults = [fault for index, request in enumerate(requests) for fault in _score_faults(index, request, info)]
    # One object for all the sequences of a call, which may hold millions of ids.
    for masked in {id(request.masked_token_ids): request.masked_token_ids for request in requests}.values():
        faults += _masked_faults("masked_token_ids", masked, info)
    if not requests:
        faults.append(FieldViolation("sequences", "empty; send at least one sequence"))
    _raise(faults)
    if not info.supports_hidden and any(request.wants.hidden for request in requests):
        raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, info.hidden_refusal, teacher=info.name)


def check_generations(requests: Sequence[GenerateRequest], info: TeacherInfo) -> None:
    """Raise INVALID_REQUEST naming every fault."""
    faults = [fault for index, request in enumerate(requests) for fault in _generation_faults(index, request, info)]
    for index, request in enumerate(requests):
        faults += _masked_faults(f"prompts[{index}].masked_token_ids", request.masked_token_ids, info)
    if not requests:
        faults.append(FieldViolation("prompts", "empty; send at least one prompt"))
    _raise(faults)


def check_count(field: str, count: int) -> None:
    """Raise INVALID_REQUEST unless there is something to do, and not too much of it for one call."""
    if not count:
        raise violations_error([FieldViolation(field, "none given; send at least one")])
    if count > MOST_SEQUENCES:
        raise violations_error([FieldViolation(field, f"{count} of them; send at most {MOST_SEQUENCES} in one call")])


def check_few(field: str, count: int, most: int) -> None:
    """Raise INVALID_REQUEST for a list so long that looking at what is in it would hold up everybody else."""
    if count > most:
        raise violations_error([FieldViolation(field, f"{count} of them; send at most {most}")])


def check_length(field: str, tokens: int, info: TeacherInfo) -> None:
    """Raise INVALID_REQUEST for more tokens than the teacher takes."""
    if tokens > info.max_context:
        raise violations_error([_too_long(field, tokens, info)])


def check_ids(path: str, ids: Int32, info: TeacherInfo) -> None:
    """Raise INVALID_REQUEST when an id is outside what the teacher's logits are wide."""
    wrong = np.flatnonzero((ids < 0) | (ids >= info.padded_vocab_size))
    if len(wrong):
        where = f"id {ids[wrong[0]]} at place {wrong[0]} is no token of {info.name}"
        raise violations_error([FieldViolation(path, f"{where}; ids go from 0 to {info.vocab_size - 1}")])


def _raise(faults: list[FieldViolation]) -> None:
    # Outputs are shared by all sequences of a call, so their faults would come once for each.
    unique = list(dict.fromkeys(faults))
    if unique:
        raise violations_error(unique)


def _score_faults(index: int, request: ScoreRequest, info: TeacherInfo) -> Iterator[FieldViolation]:
    path = f"sequences[{index}]"
    size = len(request.token_ids)
    yield from _ids_faults(f"{path}.tokens.token_ids", request.token_ids, info, least=2)
    if size > info.max_context:
        yield _too_long(f"{path}.tokens.token_ids", size, info)
    if size > 1 and not 1 <= request.score_from < size:
        yield FieldViolation(f"{path}.score_from", f"{request.score_from}; must be between 1 and {size - 1}")
    elif request.candidate_ids is not None and size > 1:
        yield from _candidate_faults(f"{path}.candidate_ids", request.candidate_ids, request.rows, info)
    yield from _wants_faults(request.wants, request.candidate_ids is not None, info)


def _too_long(path: str, size: int, info: TeacherInfo) -> FieldViolation:
    return FieldViolation(path, f"{size} tokens; {info.name} takes at most {info.max_context}; send fewer")


def _masked_faults(path: str, masked: Sequence[int], info: TeacherInfo) -> Iterator[FieldViolation]:
    yield from _ids_faults(path, masked, info, least=0)
    if len(set(masked)) >= info.vocab_size:
        yield FieldViolation(path, "masks the whole vocabulary")


def _candidate_faults(path: str, candidates: Int32, rows: int, info: TeacherInfo) -> Iterator[FieldViolation]:
    if candidates.ndim != 2 or candidates.shape[0] != rows or candidates.shape[1] < 1:
        yield FieldViolation(path, f"shape {candidates.shape}; must be ({rows}, at least 1)")
        return
    if candidates.shape[1] > info.vocab_size:
        yield FieldViolation(path, f"{candidates.shape[1]} in a row; {info.name} has {info.vocab_size} tokens")
        return
    low, high = int(candidates.min()), int(candidates.max())
    if low < -1 or high >= info.vocab_size:
        wrong = low if low < -1 else high
        yield FieldViolation(path, f"holds id {wrong}; ids go from 0 to {info.vocab_size - 1}, -1 fills unused places")


def _wants_faults(wants: ScoreWants, candidates: bool, info: TeacherInfo) -> Iterator[FieldViolation]:
    if not 0 <= wants.top_k <= info.vocab_size:
        yield FieldViolation("outputs.top_k", f"{wants.top_k}; must be between 1 and {info.vocab_size}")
    if len(wants.log_z_temperatures) > MOST_TEMPERATURES:
        count = len(wants.log_z_temperatures)
        yield FieldViolation("outputs.log_z_temperatures", f"{count} temperatures; send at most {MOST_TEMPERATURES}")
        return
    for temperature in wants.log_z_temperatures:
        if not (math.isfinite(temperature) and temperature > 0):
            yield FieldViolation("outputs.log_z_temperatures", f"{temperature}; must be a positive number")
    if not (wants.token_stats or wants.top_k or wants.log_z_temperatures or wants.hidden or candidates):
        yield FieldViolation("outputs", "asks for nothing; ask for at least one output")


def _generation_faults(index: int, request: GenerateRequest, info: TeacherInfo) -> Iterator[FieldViolation]:
    path = f"prompts[{index}]"
    yield from _ids_faults(f"{path}.tokens.token_ids", request.prompt_ids, info, least=1)
    yield from _ids_faults(f"{path}.stop_token_ids", request.stop_token_ids, info, least=0)
    if request.max_tokens < 1:
        yield FieldViolation(f"{path}.max_tokens", f"{request.max_tokens}; must be at least 1")
    elif len(request.prompt_ids) + request.max_tokens > info.max_context:
        needed = f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} new ones"
        yield FieldViolation(f"{path}.max_tokens", f"{needed}; {info.name} takes at most {info.max_context} together")
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        yield FieldViolation(f"{path}.temperature", f"{request.temperature}; must be 0 (greedy) or positive")
    if not 0 < request.top_p <= 1:
        yield FieldViolation(f"{path}.top_p", f"{request.top_p}; must be above 0 and at most 1")
    most = min(MOST_ALTERNATIVES, info.vocab_size)
    if not 0 <= request.top_logprobs <= most:
        yield FieldViolation(f"{path}.top_logprobs", f"{request.top_logprobs}; must be 0 to {most}")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        yield FieldViolation(f"{path}.seed", f"{request.seed}; must be 0 to {MAX_SEED}")


def _ids_faults(path: str, ids: Any, info: TeacherInfo, *, least: int) -> Iterator[FieldViolation]:
    values = np.asarray(ids, np.int64)
    if values.ndim != 1 or len(values) < least:
        wanted = "a token to score needs one before it" if least == 2 else "send at least one token"
        yield FieldViolation(path, f"{values.size} tokens; {wanted}")
        return
    wrong = np.flatnonzero((values < 0) | (values >= info.vocab_size))
    if len(wrong):
        where = f"id {values[wrong[0]]} at place {wrong[0]}"
        yield FieldViolation(path, f"{where} is no token of {info.name}; ids go from 0 to {info.vocab_size - 1}")
