"""What the daemon offers, as plain entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd_daemon.v1 import catalog_pb2 as pb
from opd_daemon.wire.runs import config_from_proto, struct_from_proto


@dataclass(frozen=True, slots=True)
class TrainerEntry:
    """A training method; options_schema is the JSON Schema of `trainer_options`."""

    name: str
    version: str
    summary: str
    plugin: str
    options_schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DivergenceEntry:
    """A divergence; signals are those it can be had from, plugin is empty for those that are built in."""

    name: str
    summary: str
    signals: tuple[str, ...]
    options_schema: dict[str, Any]
    plugin: str


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """A plugin; `error` says why it is not in use and is empty when it is."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    trainers: tuple[str, ...]
    import_seconds: float
    error: str
    divergences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model folder; quantization_bits is 0 when it is not quantised."""

    path: str
    name: str
    architecture: str
    weight_bytes: int
    quantization_bits: int


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """An adapter folder; run_id is empty when no run of this daemon made it."""

    path: str
    run_id: str
    base_model: str
    rank: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PresetEntry:
    """A named set of configuration values."""

    name: str
    summary: str
    values: dict[str, Any]


def trainer_entry(message: pb.Trainer) -> TrainerEntry:
    """A trainer."""
    schema = struct_from_proto(message.options_schema)
    return TrainerEntry(message.name, message.version, message.summary, message.plugin, schema)


def divergence_entry(message: pb.Divergence) -> DivergenceEntry:
    """A divergence."""
    schema = struct_from_proto(message.options_schema)
    return DivergenceEntry(message.name, message.summary, tuple(message.signals), schema, message.plugin)


def plugin_entry(message: pb.Plugin) -> PluginEntry:
    """A plugin."""
    return PluginEntry(
        message.name,
        message.distribution,
        message.version,
        tuple(message.hooks),
        tuple(message.trainers),
        message.import_seconds,
        message.error,
        tuple(message.divergences),
    )


def model_entry(message: pb.Model) -> ModelEntry:
    """A model folder."""
    return ModelEntry(message.path, message.name, message.architecture, message.weight_bytes, message.quantization_bits)


def adapter_entry(message: pb.Adapter) -> AdapterEntry:
    """An adapter folder."""
    return AdapterEntry(message.path, message.run_id, message.base_model, message.rank, message.bytes)


def preset_entry(message: pb.Preset) -> PresetEntry:
    """A preset."""
    return PresetEntry(message.name, message.summary, config_from_proto(message.config))
