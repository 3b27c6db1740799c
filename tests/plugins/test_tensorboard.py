"""A third party can listen to events: the TensorBoard plugin, found by its entry point, writes files one can read."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from opd_daemon.plugins import PluginRegistry
from opd_daemon.types import Event, EventKind, Run, RunState

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginRegistry]:
    monkeypatch.setenv("OPD_HOME", str(tmp_path))
    found = PluginRegistry.discover({"tensorboard"})
    assert [plugin.name for plugin in found.loaded] == ["tensorboard"], found.failed
    yield found
    found.daemon_stopping()


def event(kind: EventKind, run_id: str = "r1", **payload: Any) -> Event:
    return Event(kind, run_id, payload, NOW)


def written(folder: Path) -> list[event_pb2.Event]:
    """Every record of every event file: length, checksum, message, checksum."""
    found = []
    for path in sorted(folder.glob("events*")):
        content = path.read_bytes()
        while content:
            [length] = struct.unpack_from("<Q", content)
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(folder: Path) -> list[tuple[str, int, Any]]:
    return [
        (value.tag, entry.step, pytest.approx(value.simple_value))
        for entry in written(folder)
        for value in entry.summary.value
    ]


def test_steps_and_evaluations_become_scalars(registry: PluginRegistry, tmp_path: Path) -> None:
    registry.notify_event(event(EventKind.METRICS, step=1, total_steps=9, loss=0.5, tokens=12))
    registry.notify_event(event(EventKind.LOG, level="info", text="hello"))
    registry.notify_event(event(EventKind.EVALUATION, step=1, forward_kl=0.25, exact=True, checkpoint_path=""))
    registry.notify_event(event(EventKind.METRICS, step=2, total_steps=9, loss=math.nan, tokens=13))
    registry.daemon_stopping()
    assert scalars(tmp_path / "tensorboard" / "r1") == [
        ("train/loss", 1, 0.5),
        ("train/tokens", 1, 12),
        ("eval/forward_kl", 1, 0.25),
        ("train/tokens", 2, 13),
    ]


def test_each_run_has_a_folder_and_a_finished_one_is_closed(registry: PluginRegistry, tmp_path: Path) -> None:
    for run_id in ("r1", "r2"):
        registry.notify_event(event(EventKind.METRICS, run_id, step=1, loss=0.5))
        registry.after_run_finished(Run(run_id=run_id, state=RunState.SUCCEEDED, config={}, created_at=NOW))
    registry.daemon_stopping()
    for run_id in ("r1", "r2"):
        assert scalars(tmp_path / "tensorboard" / run_id) == [("train/loss", 1, 0.5)]


def test_a_resumed_run_takes_back_the_steps_it_makes_again(registry: PluginRegistry, tmp_path: Path) -> None:
    stopped = Run(run_id="r1", state=RunState.STOPPED, config={}, created_at=NOW)
    registry.notify_event(event(EventKind.METRICS, step=5, loss=0.5))
    registry.after_run_finished(stopped)
    registry.notify_event(event(EventKind.METRICS, step=4, loss=0.25))
    registry.daemon_stopping()
    starts = [entry.step for entry in written(tmp_path / "tensorboard" / "r1") if entry.session_log.status]
    assert starts == [4]
