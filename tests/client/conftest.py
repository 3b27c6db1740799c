"""A real daemon for the client's tests, with the tiny teacher loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.home import Home


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDaemon]:
    with LocalDaemon(Home(tmp_path_factory.mktemp("client") / "home")) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: LocalDaemon, tiny_teacher: Path) -> Iterator[Client]:
    with daemon.client() as client:
        for _ in client.load_teacher(str(tiny_teacher), force=True):
            pass
        yield client
