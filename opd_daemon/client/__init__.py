"""Python client of the daemon: finds it, knows its token, answers in the domain's own types."""

from opd_daemon.client.catalog import AdapterEntry, ModelEntry, PluginEntry, PresetEntry, TrainerEntry
from opd_daemon.client.client import Client
from opd_daemon.client.connection import Endpoint, find_endpoint
from opd_daemon.client.local import LocalDaemon
from opd_daemon.client.teacher import GeneratedPiece, RemoteTeacher

__all__ = [
    "AdapterEntry",
    "Client",
    "Endpoint",
    "GeneratedPiece",
    "LocalDaemon",
    "ModelEntry",
    "PluginEntry",
    "PresetEntry",
    "RemoteTeacher",
    "TrainerEntry",
    "find_endpoint",
]
