"""What `opd distill` was asked for: a file, a preset and settings, merged, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from opd_daemon.config import PRESETS, RunConfig, load_yaml, parse_config
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.home import user_path

PREFIX = "config."


@dataclass(frozen=True, slots=True)
class DistillRequest:
    """Merged values, valid by themselves; `origins` maps dotted field names to the file and line, flag or preset."""

    source: str
    values: dict[str, Any]
    origins: dict[str, str]

    def config(self) -> RunConfig:
        """The validated configuration, paths absolute.

        Raises:
            OpdError: INVALID_RUN_CONFIG, every fault with the place it comes from.
        """
        try:
            return parse_config(self.values).expanded()
        except OpdError as error:
            raise self.placed(error) from None

    def placed(self, error: OpdError) -> OpdError:
        """The same error with the origin of each faulty value in front."""
        violations = [FieldViolation(self._place(entry.field), entry.description) for entry in error.violations]
        return OpdError(error.reason, error.message, violations=violations, **error.metadata)

    def _place(self, field: str) -> str:
        name = field.removeprefix(PREFIX)
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if origin := self.origins.get(".".join(parts[:length])):
                return origin if origin.startswith("--set") else f"{origin}: {name}"
        for inner, origin in self.origins.items():
            if inner.startswith(f"{name}."):
                return origin if origin.startswith("--set") else f"{origin}: {name}"
        return f"{self.source}: {name}" if name != "config" else self.source


def read_request(file: Path, preset: str, settings: Sequence[str]) -> DistillRequest:
    """Read and merge: the preset under the file, the file under the settings.

    Relative paths in the file are relative to its folder; those in settings to the working directory.
    """
    values, origins = _from_preset(preset)
    layers = [_from_file(file), *map(_from_setting, settings)]
    for layer, places in layers:
        _merge(values, layer)
        origins.update(places)
    return DistillRequest(str(file), values, origins)


def _from_preset(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    if not name:
        return {}, {}
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        message = f"--preset {name}: no such preset; did you mean {near}? There are {', '.join(sorted(PRESETS))}"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message, preset=name)
    return dict(PRESETS[name]), dict.fromkeys(PRESETS[name], f"preset {name}")


def _from_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    values = load_yaml(file)
    absolute = _with_absolute_paths(values, file.expanduser().absolute().parent)
    return absolute, {name: f"{file}:{line}" for name, line in _lines(file)}


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    """Dotted name and line number of every key, two levels deep."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for key, value in getattr(root, "value", []):
        yield str(key.value), key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                yield f"{key.value}.{inner.value}", inner.start_mark.line + 1


def _from_setting(setting: str) -> tuple[dict[str, Any], dict[str, str]]:
    name, equals, written = setting.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"--set {setting}: write it as name=value, as in --set num_steps=200")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"--set {setting}: the value is no YAML; quote it") from None
    value = "" if value is None and not written.strip() else value
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return _with_absolute_paths(nested, Path.cwd()), {name: f"--set {setting}"}


def _with_absolute_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        name: os.path.normpath(folder / user_path(value))
        if name.endswith("_path") and isinstance(value, str) and value
        else value
        for name, value in values.items()
    }


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            into[name] = {**into[name], **value}
        else:
            into[name] = value
