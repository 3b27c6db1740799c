"""Plugins: found through entry points, loaded in isolation, called one by one."""

from __future__ import annotations

from opd_daemon.plugins.discovery import FailedPlugin, LoadedPlugin
from opd_daemon.plugins.registry import PluginRegistry

__all__ = ["FailedPlugin", "LoadedPlugin", "PluginRegistry"]
