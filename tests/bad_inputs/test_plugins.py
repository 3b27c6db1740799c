"""A daemon whose plugins are broken in every way serves on: each is named with its cure, the good one is in use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_daemon.client import Client
from opd_daemon.errors import Reason
from opd_daemon.home import Home
from opd_daemon.types import RunState
from opd_daemon.v1.catalog_pb2 import ListPluginsRequest, ListTrainersRequest, Plugin
from opd_daemon.v1.catalog_pb2_grpc import CatalogServiceStub
from tests.bad_inputs.past import with_past_runs
from tests.bad_inputs.stage import refusal
from tests.e2e.conftest import DaemonProcess

HOOK = "from opd_daemon import RunRefused, TrainerInfo, hookimpl\n"
TRAINER = HOOK + '@hookimpl\ndef opd_trainers():\n    return [TrainerInfo("{}", "1.0", "Trains.", lambda: None)]\n'
LISTENER = HOOK + "@hookimpl\ndef opd_event(event):\n    {}\n"
SLOW_SECONDS = 3.0

# name: number in the checklist, code, what is told of it ("" when it is in use nevertheless).
PLUGINS: dict[str, tuple[int, str, str]] = {
    "good": (38, TRAINER.format("mine"), ""),
    "no_import": (38, "import no_such_module\n", "no_such_module"),
    "no_syntax": (39, "this is no Python\n", "SyntaxError"),
    "slow": (40, f"import time\ntime.sleep({SLOW_SECONDS})\n" + TRAINER.format("slow"), ""),
    "exits": (41, "import sys\nsys.exit(3)\n", "sys.exit(3)"),
    "wrong_hook": (42, HOOK + "@hookimpl\ndef opd_trainer():\n    return []\n", "opd_trainer is no hook"),
    "wrong_argument": (43, HOOK + "@hookimpl\ndef opd_event(evnt):\n    pass\n", "evnt"),
    "taken": (44, TRAINER.format("mine"), "trainer 'mine' is offered by another plugin"),
    "loud": (45, "print('a line on standard output')\n" + TRAINER.format("loud"), ""),
    "raises": (46, LISTENER.format("raise RuntimeError('no')"), ""),
    "leaves": (46, LISTENER.format("raise SystemExit(1)"), ""),
    "hangs": (46, "import time\n" + LISTENER.format("time.sleep(3600)"), ""),
    "odd": (46, LISTENER.format("raise BaseException('odd')"), ""),
}


def install(folder: Path, name: str, code: str) -> None:
    """A package with one module, as pip would leave it."""
    info = folder / f"opd_{name}-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: opd-{name}\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text(f"[opd_daemon]\n{name} = bad_plugin_{name}\n")
    (folder / f"bad_plugin_{name}.py").write_text(code)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("plugins")
    for name, (_, code, _) in PLUGINS.items():
        install(folder / "site", name, code)
    home = Home(folder / "home")
    home.root.mkdir()
    with_past_runs(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_PLUGINS", ",".join(PLUGINS))
        patch.setenv("PYTHONPATH", str(folder / "site"), prepend=":")
        process = DaemonProcess(home)
    yield process
    assert process.stop() == 0, (home.root / "daemon.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def plugins(client: Client) -> dict[str, Plugin]:
    answer = CatalogServiceStub(client.channel).ListPlugins(ListPluginsRequest())
    return {plugin.name: plugin for plugin in answer.plugins}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_broken_plugin_is_named_with_its_fault(plugins: dict[str, Plugin], name: str) -> None:
    _, _, told = PLUGINS[name]
    plugin = plugins[name]
    assert (plugin.distribution, plugin.version) == (f"opd-{name}", "2.5")
    assert bool(plugin.error) == bool(told)
    assert told in plugin.error
    assert "\n" not in plugin.error


def test_the_good_ones_are_in_use(client: Client) -> None:
    trainers = CatalogServiceStub(client.channel).ListTrainers(ListTrainersRequest()).trainers
    assert {trainer.name: trainer.plugin for trainer in trainers} == {"mine": "good", "slow": "slow", "loud": "loud"}


def test_a_slow_import_is_told(daemon: DaemonProcess, plugins: dict[str, Plugin]) -> None:
    assert plugins["slow"].import_seconds >= SLOW_SECONDS
    assert re.search(r"plugin 'slow' took \d", (daemon.home.root / "daemon.log").read_text())


def test_hooks_that_raise_leave_or_hang_hold_nobody_up(client: Client) -> None:
    error = refusal(lambda: client.resume("failed"))  # its trainer is not in use here: an answer, and no run
    assert error.reason is Reason.TRAINER_NOT_FOUND
    assert client.run("won")[0].state is RunState.SUCCEEDED
    for _ in range(20):
        client.unload_teacher()
    assert client.teacher()[0] == "UNLOADED"
