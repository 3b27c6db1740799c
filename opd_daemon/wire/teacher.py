"""The teacher and its cache on the wire; what the teacher computes is in `arrays`."""

from __future__ import annotations

from opd_daemon.types import CacheStats, LoadProgress, TeacherInfo, TeacherState
from opd_daemon.v1 import teacher_pb2 as pb
from opd_daemon.wire.runs import seconds_from_proto, seconds_to_proto


def teacher_to_proto(state: TeacherState, info: TeacherInfo | None, failure: str = "") -> pb.Teacher:
    """The teacher's description."""
    message = pb.Teacher(state=pb.TeacherState.Value(f"TEACHER_STATE_{state}"), failure=failure)
    if info is not None:
        for name in _INFO_FIELDS:
            setattr(message, name, getattr(info, name))
        message.eos_token_ids.extend(info.eos_token_ids)
    return message


def teacher_from_proto(message: pb.Teacher) -> tuple[TeacherState, TeacherInfo | None, str]:
    """State, facts (None unless READY) and the last failure."""
    known = message.state in pb.TeacherState.values() and message.state != pb.TEACHER_STATE_UNSPECIFIED
    name = pb.TeacherState.Name(message.state).removeprefix("TEACHER_STATE_") if known else "UNLOADED"
    info = None
    if message.state == pb.TEACHER_STATE_READY:
        facts = {field_name: getattr(message, field_name) for field_name in _INFO_FIELDS}
        info = TeacherInfo(path="", eos_token_ids=tuple(message.eos_token_ids), **facts)
    return TeacherState(name), info, message.failure


_INFO_FIELDS = (
    "name",
    "digest",
    "tokenizer_digest",
    "architecture",
    "vocab_size",
    "padded_vocab_size",
    "hidden_size",
    "max_context",
    "weight_bytes",
    "dtype",
    "quantization_bits",
    "supports_hidden",
    "hidden_refusal",
)


def progress_to_proto(progress: LoadProgress) -> pb.LoadTeacherResponse:
    """One report of a load."""
    phase = pb.LoadPhase.Value(f"LOAD_PHASE_{progress.phase.upper()}")
    return pb.LoadTeacherResponse(phase=phase, fraction=progress.fraction, message=progress.message)


def progress_from_proto(message: pb.LoadTeacherResponse) -> LoadProgress:
    """One report of a load."""
    known = message.phase in pb.LoadPhase.values()
    phase = pb.LoadPhase.Name(message.phase).removeprefix("LOAD_PHASE_").lower() if known else "loading"
    return LoadProgress(phase, message.fraction, message.message)


def cache_stats_to_proto(stats: CacheStats) -> pb.CacheStats:
    """Cache statistics."""
    return pb.CacheStats(
        hits=stats.hits,
        misses=stats.misses,
        corrupt=stats.corrupt,
        evicted=stats.evicted,
        saved=seconds_to_proto(stats.milliseconds_saved / 1000),
        entries=stats.entries,
        bytes=stats.bytes,
        limit_bytes=stats.limit_bytes,
    )


def cache_stats_from_proto(message: pb.CacheStats) -> CacheStats:
    """Cache statistics."""
    return CacheStats(
        hits=message.hits,
        misses=message.misses,
        corrupt=message.corrupt,
        evicted=message.evicted,
        milliseconds_saved=seconds_from_proto(message.saved) * 1000,
        entries=message.entries,
        bytes=message.bytes,
        limit_bytes=message.limit_bytes,
    )
