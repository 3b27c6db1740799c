"""All checks, in the order in which people should read them."""

from __future__ import annotations

from collections.abc import Iterator

from opd_daemon.doctor import home as places
from opd_daemon.doctor import installation, machine
from opd_daemon.doctor.finding import Finding
from opd_daemon.home import Home


def examine(home: Home) -> Iterator[Finding]:
    """Look at the installation, the machine and a home; changes nothing."""
    yield from installation.versions()
    yield from installation.plugins()
    yield machine.products()
    yield machine.memory()
    yield machine.open_files()
    yield places.disk(home)
    yield places.folder(home)
    yield places.daemon(home)
    yield places.left_behind(home)
    yield places.store(home)
    yield from places.models(home)
