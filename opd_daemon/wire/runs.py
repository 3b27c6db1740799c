"""Runs, their configurations, plans and checkpoints on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value

from opd_daemon.types import Checkpoint, Plan, PlannedBytes, Run, RunState
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.wire.events import (
    metrics_from_proto,
    metrics_to_proto,
    state_from_proto,
    state_to_proto,
    time_from_proto,
    time_to_proto,
)

_STRUCTS = ("trainer_options", "divergence_options", "optimizer_options")
_NESTED = (*_STRUCTS, "lora")


def config_to_proto(values: Mapping[str, Any]) -> pb.RunConfig:
    """Configuration values by name as a message; what isn't given, or is None, stays absent.

    Raises:
        ValueError: a name the contract doesn't have, or a value of another type. Validate first.
    """
    message = pb.RunConfig(**{key: value for key, value in values.items() if key not in _NESTED and value is not None})
    for name in _STRUCTS:
        if values.get(name):
            getattr(message, name).CopyFrom(struct_to_proto(values[name]))
    lora = values.get("lora")
    if lora:
        message.lora.CopyFrom(pb.LoraConfig(**{key: value for key, value in lora.items() if value is not None}))
    return message


def config_from_proto(message: pb.RunConfig) -> dict[str, Any]:
    """The fields that are set, by name."""
    values = {field.name: value for field, value in message.ListFields() if field.name not in _NESTED}
    structs = {field.name: value for field, value in message.ListFields() if field.name in _STRUCTS}
    values |= {name: struct_from_proto(value) for name, value in structs.items()}
    if message.HasField("lora"):
        lora = {field.name: value for field, value in message.lora.ListFields() if field.name != "keys"}
        values["lora"] = {**lora, **({"keys": list(message.lora.keys)} if message.lora.keys else {})}
    return values


def struct_to_proto(values: Mapping[str, Any]) -> Struct:
    """Plain JSON data as a Struct."""
    return json_format.ParseDict(dict(values), Struct())


def struct_from_proto(message: Struct) -> dict[str, Any]:
    """A Struct as plain JSON data; whole numbers become int, since JSON has one kind of number only."""
    # Not json_format, which refuses the NaN that a client may send.
    return {key: _plain(value) for key, value in message.fields.items()}


def _plain(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return struct_from_proto(value.struct_value)
        case "list_value":
            return [_plain(entry) for entry in value.list_value.values]
        case _:
            return None


def seconds_to_proto(seconds: float) -> Duration:
    """Seconds as a Duration."""
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=min(max(seconds, 0.0), 1e9)))
    return duration


def seconds_from_proto(duration: Duration) -> float:
    """A Duration in seconds, of whatever length: some are longer than a timedelta can be."""
    return duration.seconds + duration.nanos / 1e9


def plan_to_proto(plan: Plan) -> pb.RunPlan:
    """A plan as a message."""
    return pb.RunPlan(
        duration=seconds_to_proto(plan.seconds),
        peak_bytes=plan.peak_bytes,
        daemon_peak_bytes=plan.daemon_peak_bytes,
        worker_peak_bytes=plan.worker_peak_bytes,
        disk_bytes=plan.disk_bytes,
        available_bytes=plan.available_bytes,
        assumptions=plan.assumptions,
        warnings=plan.warnings,
        phases=[pb.PlannedPhase(name=name, duration=seconds_to_proto(value)) for name, value in plan.phases],
        memory=[_bytes_to_proto(part) for part in plan.memory],
        disk=[_bytes_to_proto(part) for part in plan.disk],
        fits=plan.fits,
        advice=plan.advice,
        machine=plan.machine,
        calibrated=plan.calibrated,
    )


def _bytes_to_proto(part: PlannedBytes) -> pb.PlannedBytes:
    return pb.PlannedBytes(process=part.process, name=part.name, bytes=part.bytes)


def _bytes_from_proto(message: pb.PlannedBytes) -> PlannedBytes:
    return PlannedBytes(message.process, message.name, message.bytes)


def plan_from_proto(message: pb.RunPlan) -> Plan:
    """A message as a plan."""
    return Plan(
        seconds=seconds_from_proto(message.duration),
        daemon_peak_bytes=message.daemon_peak_bytes,
        worker_peak_bytes=message.worker_peak_bytes,
        disk_bytes=message.disk_bytes,
        available_bytes=message.available_bytes,
        assumptions=tuple(message.assumptions),
        warnings=tuple(message.warnings),
        phases=tuple((phase.name, seconds_from_proto(phase.duration)) for phase in message.phases),
        memory=tuple(_bytes_from_proto(part) for part in message.memory),
        disk=tuple(_bytes_from_proto(part) for part in message.disk),
        advice=tuple(message.advice),
        machine=message.machine,
        calibrated=message.calibrated,
        fits=message.fits,
    )


def run_to_proto(run: Run) -> pb.Run:
    """A run as a message."""
    message = pb.Run(
        run_id=run.run_id,
        state=state_to_proto(run.state),
        config=config_to_proto(run.config),
        created_at=time_to_proto(run.created_at),
        step=run.step,
        total_steps=run.total_steps,
        checkpoint_step=run.checkpoint_step,
        best_step=run.best_step,
        adapter_path=run.adapter_path,
        attempt=run.attempt,
        memory_halvings=run.memory_halvings,
        report_path=run.report_path,
    )
    if run.started_at:
        message.started_at.CopyFrom(time_to_proto(run.started_at))
    if run.finished_at:
        message.finished_at.CopyFrom(time_to_proto(run.finished_at))
    if run.seconds_remaining is not None:
        message.remaining.CopyFrom(seconds_to_proto(run.seconds_remaining))
    if run.plan:
        message.plan.CopyFrom(plan_to_proto(run.plan))
    if run.latest_metrics:
        message.latest_metrics.CopyFrom(metrics_to_proto(run.latest_metrics))
    if run.error_reason or run.error_message:
        message.error.CopyFrom(pb.RunError(reason=run.error_reason, message=run.error_message))
    return message


def run_from_proto(message: pb.Run) -> Run:
    """A message as a run."""
    return Run(
        run_id=message.run_id,
        state=state_from_proto(message.state) or RunState.PENDING,
        config=config_from_proto(message.config),
        created_at=time_from_proto(message.created_at),
        session_id=message.config.session_id,
        started_at=time_from_proto(message.started_at) if message.HasField("started_at") else None,
        finished_at=time_from_proto(message.finished_at) if message.HasField("finished_at") else None,
        step=message.step,
        total_steps=message.total_steps,
        seconds_remaining=seconds_from_proto(message.remaining) if message.HasField("remaining") else None,
        plan=plan_from_proto(message.plan) if message.HasField("plan") else None,
        latest_metrics=metrics_from_proto(message.latest_metrics) if message.HasField("latest_metrics") else {},
        checkpoint_step=message.checkpoint_step if message.HasField("checkpoint_step") else None,
        best_step=message.best_step if message.HasField("best_step") else None,
        adapter_path=message.adapter_path,
        error_reason=message.error.reason,
        error_message=message.error.message,
        attempt=message.attempt,
        memory_halvings=message.memory_halvings,
        report_path=message.report_path,
    )


def checkpoint_to_proto(checkpoint: Checkpoint) -> pb.Checkpoint:
    """A checkpoint as a message."""
    return pb.Checkpoint(
        step=checkpoint.step,
        path=checkpoint.path,
        created_at=time_to_proto(checkpoint.created_at),
        bytes=checkpoint.bytes,
        is_best=checkpoint.is_best,
        is_final=checkpoint.is_final,
        validation_kl=checkpoint.validation_kl,
    )


def checkpoint_from_proto(message: pb.Checkpoint) -> Checkpoint:
    """A message as a checkpoint."""
    return Checkpoint(
        step=message.step,
        path=message.path,
        created_at=time_from_proto(message.created_at),
        bytes=message.bytes,
        is_best=message.is_best,
        is_final=message.is_final,
        validation_kl=message.validation_kl if message.HasField("validation_kl") else None,
    )
