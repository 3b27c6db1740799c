"""CatalogService: what there is to choose from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opd_daemon.config import PRESET_SUMMARIES, PRESETS, RunConfig
from opd_daemon.distill.registry import BUILT_IN
from opd_daemon.home import Home
from opd_daemon.paths import AllowedRoots, open_plain
from opd_daemon.plugins import PluginRegistry
from opd_daemon.rpc.interceptor import Context
from opd_daemon.types import Run
from opd_daemon.v1 import catalog_pb2 as pb
from opd_daemon.v1 import catalog_pb2_grpc as rpc
from opd_daemon.wire.runs import config_to_proto, struct_to_proto


class CatalogServicer(rpc.CatalogServiceServicer):
    """Thin layer over the plugin registry and the model folders."""

    def __init__(self, plugins: PluginRegistry, home: Home, all_runs: Callable[[], Any], roots: AllowedRoots) -> None:
        self._plugins = plugins
        self._home = home
        self._all_runs = all_runs
        self._roots = roots

    async def ListTrainers(self, request: pb.ListTrainersRequest, context: Context) -> pb.ListTrainersResponse:
        trainers = [
            pb.Trainer(
                name=trainer.name,
                version=trainer.version,
                summary=trainer.summary,
                plugin=self._plugins.plugin_of_trainer(trainer.name),
                options_schema=struct_to_proto(trainer.options.model_json_schema()),
            )
            for _, trainer in sorted(self._plugins.trainers.items())
        ]
        schema = struct_to_proto(RunConfig.model_json_schema())
        return pb.ListTrainersResponse(trainers=trainers, config_schema=schema)

    async def ListDivergences(self, request: pb.ListDivergencesRequest, context: Context) -> pb.ListDivergencesResponse:
        divergences = [
            pb.Divergence(
                name=divergence.name,
                summary=divergence.summary,
                signals=divergence.signals,
                options_schema=struct_to_proto(divergence.options.model_json_schema()),
                plugin=self._plugins.plugin_of_divergence(divergence.name),
            )
            for _, divergence in sorted({**BUILT_IN, **self._plugins.divergences}.items())
        ]
        return pb.ListDivergencesResponse(divergences=divergences)

    async def ListPlugins(self, request: pb.ListPluginsRequest, context: Context) -> pb.ListPluginsResponse:
        loaded = [
            pb.Plugin(
                name=plugin.name,
                distribution=plugin.distribution,
                version=plugin.version,
                hooks=plugin.hooks,
                trainers=plugin.trainers,
                import_seconds=plugin.seconds,
                divergences=plugin.divergences,
            )
            for plugin in self._plugins.loaded
        ]
        failed = [
            pb.Plugin(name=plugin.name, distribution=plugin.distribution, version=plugin.version, error=plugin.error)
            for plugin in self._plugins.failed
        ]
        return pb.ListPluginsResponse(plugins=sorted([*loaded, *failed], key=lambda plugin: plugin.name))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        runs: list[Run] = await self._all_runs()
        used = {run.config[name] for run in runs for name in ("base_model_path", "teacher_model_path")}
        models = await asyncio.to_thread(_models, [*_subfolders(self._home.models), *used], self._roots)
        return pb.ListModelsResponse(models=models)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        runs: list[Run] = await self._all_runs()
        made = {run.adapter_path: run.run_id for run in runs if run.adapter_path}
        started_from = {path: "" for run in runs if (path := run.config.get("student_adapter_path"))}
        adapters = await asyncio.to_thread(_adapters, {**started_from, **made}, self._roots)
        return pb.ListAdaptersResponse(adapters=adapters)

    async def ListPresets(self, request: pb.ListPresetsRequest, context: Context) -> pb.ListPresetsResponse:
        presets = [
            pb.Preset(name=name, summary=PRESET_SUMMARIES[name], config=config_to_proto(values))
            for name, values in sorted(PRESETS.items())
        ]
        return pb.ListPresetsResponse(presets=presets)


def _subfolders(folder: Path) -> list[str]:
    return [str(entry) for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def _models(paths: Iterable[str], roots: AllowedRoots) -> list[pb.Model]:
    models = []
    for path in sorted(set(paths)):
        config = _json(Path(path) / "config.json") if not roots.fault(path, "folder") else None
        if config is not None:
            bits = (config.get("quantization") or {}).get("bits", 0)
            models.append(
                pb.Model(
                    path=path,
                    name=Path(path).name,
                    architecture=str(config.get("model_type", "")),
                    weight_bytes=sum(shard.stat().st_size for shard in Path(path).glob("model*.safetensors")),
                    quantization_bits=bits,
                )
            )
    return models


def _adapters(run_of_path: dict[str, str], roots: AllowedRoots) -> list[pb.Adapter]:
    adapters = []
    for path, run_id in sorted(run_of_path.items()):
        if roots.fault(path, "folder"):
            continue
        config, weights = _json(Path(path) / "adapter_config.json"), Path(path) / "adapters.safetensors"
        if config is not None and weights.is_file():
            rank = (config.get("lora_parameters") or {}).get("rank", 0)
            size = weights.stat().st_size
            base = str(config.get("model", ""))
            adapters.append(pb.Adapter(path=path, run_id=run_id, base_model=base, rank=rank, bytes=size))
    return adapters


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is none: catalogues list what is usable and skip the rest."""
    try:
        with open_plain(path) as file:
            values = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
