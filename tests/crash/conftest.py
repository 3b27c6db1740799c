"""Daemons that die, and leave nothing behind when a test is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.stage import Daemon


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons on one home; settings are those of `ServeSettings`."""
    made: list[Daemon] = []

    def make(**settings: Any) -> Daemon:
        made.append(Daemon(tmp_path, **settings))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon()
