"""What is installed: versions and plugins."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from opd_daemon.doctor.finding import Finding, error, fine
from opd_daemon.plugins import PluginRegistry

DISTRIBUTIONS = ("opd-daemon", "mlx", "mlx-lm", "grpcio", "protobuf")


def versions() -> Iterator[Finding]:
    """Python and the packages everything stands on."""
    found, missing = [f"Python {platform.python_version()}"], []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    yield fine("versions", ", ".join(found))
    for name in missing:
        yield error("versions", f"{name} is not installed", "pip install --force-reinstall opd-daemon")


def plugins() -> Iterator[Finding]:
    """Every plugin, loaded as the daemon loads it."""
    registry = PluginRegistry.discover()
    for failed in registry.failed:
        cure = f"repair or uninstall {failed.distribution or failed.name}; $OPD_PLUGINS can leave it out"
        yield error("plugins", failed.error, cure)
    if not registry.trainers:
        yield error("plugins", "no trainer is installed, so no run can start", "pip install opd-trainers")
    elif not registry.failed:
        yield fine("plugins", ", ".join(plugin.name for plugin in registry.loaded))
