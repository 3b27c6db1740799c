"""Events, metrics and gauges on the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from opd_daemon.errors import invalid
from opd_daemon.types import Event, EventKind, Gauges, RunState
from opd_daemon.v1 import event_pb2 as pb


def time_to_proto(time: datetime) -> Timestamp:
    """A timezone-aware time as Timestamp."""
    stamp = Timestamp()
    stamp.FromDatetime(time.astimezone(UTC))
    return stamp


def time_from_proto(stamp: Timestamp) -> datetime:
    """A Timestamp as an aware time in UTC.

    Raises:
        OpdError: INVALID_REQUEST for a moment outside the years 1 to 9999.
    """
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise invalid(
            "time", f"{stamp.seconds} seconds are outside the years 1 to 9999; send the time of now"
        ) from None


def state_to_proto(state: RunState | str | None) -> pb.RunState.ValueType:
    """The enum value of a run state; unspecified for none."""
    return pb.RunState.Value(f"RUN_STATE_{state}") if state else pb.RUN_STATE_UNSPECIFIED


def state_from_proto(value: pb.RunState.ValueType) -> RunState | None:
    """The run state of an enum value; None when unspecified or newer than this client."""
    if value not in pb.RunState.values():
        return None
    name = pb.RunState.Name(value).removeprefix("RUN_STATE_")
    return RunState(name) if name in RunState.__members__ else None


def plain(message: Message) -> dict[str, Any]:
    """Every field of a message by name: nested messages as dictionaries, lists and maps as such, absent fields None."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        absent = field.has_presence and not message.HasField(field.name)
        values[field.name] = None if absent else _plain_value(getattr(message, field.name))
    return values


def _plain_value(value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str | bytes | int | float) else [_plain_value(entry) for entry in value]


def known_fields(message: type[Message], values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `message` and are not None: payloads may be newer than the contract."""
    names = message.DESCRIPTOR.fields_by_name
    return {name: value for name, value in values.items() if name in names and value is not None}


def metrics_to_proto(values: dict[str, Any]) -> pb.StepMetrics:
    """A METRICS payload as a message."""
    return pb.StepMetrics(**known_fields(pb.StepMetrics, values))


def metrics_from_proto(message: pb.StepMetrics) -> dict[str, Any]:
    """A message as a METRICS payload."""
    return plain(message)


def evaluation_to_proto(values: dict[str, Any]) -> pb.EvaluationMetrics:
    """An EVALUATION payload as a message."""
    compared = {name: _comparison_to_proto(values[name]) for name in ("on_teacher", "on_student") if values.get(name)}
    return pb.EvaluationMetrics(**known_fields(pb.EvaluationMetrics, {**values, **compared}))


def _comparison_to_proto(values: dict[str, Any]) -> pb.Comparison:
    quartiles = [_comparison_to_proto(quartile) for quartile in values.get("quartiles", ())]
    return pb.Comparison(**known_fields(pb.Comparison, {**values, "quartiles": quartiles}))


def evaluation_from_proto(message: pb.EvaluationMetrics) -> dict[str, Any]:
    """A message as an EVALUATION payload."""
    return plain(message)


def _run_state_to_proto(values: dict[str, Any]) -> pb.RunStateChanged:
    enums = {name: state_to_proto(values.get(name)) for name in ("state", "previous")}
    return pb.RunStateChanged(**known_fields(pb.RunStateChanged, {**values, **enums}))


def _run_state_from_proto(message: pb.RunStateChanged) -> dict[str, Any]:
    states = {name: state_from_proto(getattr(message, name)) for name in ("state", "previous")}
    return {**plain(message), **{name: str(state) if state else None for name, state in states.items()}}


def _log_to_proto(values: dict[str, Any]) -> pb.LogLine:
    level = pb.LogLevel.Value(f"LOG_LEVEL_{str(values.get('level', 'info')).upper()}")
    return pb.LogLine(level=level, text=values.get("text", ""))


def _log_from_proto(message: pb.LogLine) -> dict[str, Any]:
    known = message.level in pb.LogLevel.values()
    level = pb.LogLevel.Name(message.level).removeprefix("LOG_LEVEL_").lower() if known else "info"
    return {"level": level, "text": message.text}


def _sample_to_proto(values: dict[str, Any]) -> pb.Sample:
    source = pb.SampleSource.Value(f"SAMPLE_SOURCE_{str(values.get('source', 'student')).upper()}")
    return pb.Sample(**known_fields(pb.Sample, {**values, "source": source}))


def _sample_from_proto(message: pb.Sample) -> dict[str, Any]:
    source = "teacher" if message.source == pb.SAMPLE_SOURCE_TEACHER else "student"
    return {**plain(message), "source": source}


def _checkpoint_to_proto(values: dict[str, Any]) -> pb.CheckpointWritten:
    return pb.CheckpointWritten(**known_fields(pb.CheckpointWritten, values))


def _teacher_to_proto(values: dict[str, Any]) -> pb.TeacherChanged:
    return pb.TeacherChanged(**known_fields(pb.TeacherChanged, values))


_KINDS: dict[EventKind, tuple[str, Callable[[dict[str, Any]], Message], Callable[[Any], dict[str, Any]]]] = {
    EventKind.RUN_STATE: ("run_state_changed", _run_state_to_proto, _run_state_from_proto),
    EventKind.METRICS: ("step_metrics", metrics_to_proto, metrics_from_proto),
    EventKind.EVALUATION: ("evaluation_metrics", evaluation_to_proto, evaluation_from_proto),
    EventKind.CHECKPOINT: ("checkpoint_written", _checkpoint_to_proto, plain),
    EventKind.LOG: ("log_line", _log_to_proto, _log_from_proto),
    EventKind.SAMPLE: ("sample", _sample_to_proto, _sample_from_proto),
    EventKind.TEACHER: ("teacher_changed", _teacher_to_proto, plain),
}
_KIND_OF_FIELD = {field: kind for kind, (field, _, _) in _KINDS.items()}


def event_to_proto(event: Event) -> pb.Event:
    """A durable event as a message."""
    field, to_proto, _ = _KINDS[event.kind]
    message = pb.Event(revision=event.revision, time=time_to_proto(event.time), run_id=event.run_id)
    getattr(message, field).CopyFrom(to_proto(event.payload))
    return message


def event_from_proto(message: pb.Event) -> Event | None:
    """A message as an event; None when its kind is newer than this client."""
    field = message.WhichOneof("kind")
    if field is None:
        return None
    kind = _KIND_OF_FIELD[field]
    payload = _KINDS[kind][2](getattr(message, field))
    return Event(kind, message.run_id, payload, time_from_proto(message.time), message.revision)


def gauges_to_proto(gauges: Gauges) -> pb.Gauges:
    """Readings as a message."""
    return pb.Gauges(run_id=gauges.run_id, time=time_to_proto(gauges.time), values=gauges.values)


def gauges_from_proto(message: pb.Gauges) -> Gauges:
    """A message as readings."""
    return Gauges(message.run_id, time_from_proto(message.time), dict(message.values))
