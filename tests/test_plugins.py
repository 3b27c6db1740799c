"""A broken plugin is reported by name, hook and cure, and nothing else suffers. Packages here are thrown away again."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.plugins import PluginRegistry
from opd_daemon.plugins.listener import QUEUE_LENGTH
from opd_daemon.types import Event, EventKind, Run, RunState

Install = Callable[..., None]
NOW = datetime(2026, 11, 23, tzinfo=UTC)
RUN = Run(run_id="r1", state=RunState.PENDING, config={}, created_at=NOW)
EVENT = Event(EventKind.LOG, "r1", {"level": "info", "text": "hello"}, NOW, 1)

TRAINER = """
from opd_daemon import TrainerInfo, hookimpl

@hookimpl
def opd_trainers():
    return [TrainerInfo("{name}", "1.0", "Trains.", lambda: None)]
"""

DIVERGENCE = """
from opd_daemon import DivergenceInfo, hookimpl

@hookimpl
def opd_divergences():
    return [DivergenceInfo("{name}", "Far apart.", lambda options, temperature: None, signals={signals})]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with one module, named as its entry point unless said otherwise."""
    modules: list[str] = []
    monkeypatch.delenv("OPD_PLUGINS", raising=False)

    def install_package(name: str, code: str, *, plugin: str = "") -> None:
        site, module = tmp_path / f"site_{name}", f"throwaway_{name}"
        info = site / f"opd_{name}-2.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: opd-{name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[opd_daemon]\n{plugin or name} = {module}\n")
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        modules.append(module)

    yield install_package
    for module in modules:
        sys.modules.pop(module, None)


def only_failure(registry: PluginRegistry) -> str:
    [failed] = registry.failed
    assert "\n" not in failed.error
    return failed.error


def test_a_trainer_from_its_own_package_is_found(install: Install) -> None:
    install("good", TRAINER.format(name="mine"))
    registry = PluginRegistry.discover({"good"})
    [plugin] = registry.loaded
    assert (plugin.name, plugin.distribution, plugin.version) == ("good", "opd-good", "2.5")
    assert (plugin.hooks, plugin.trainers) == (("opd_trainers",), ("mine",))
    assert registry.trainer("mine").summary == "Trains."
    assert registry.plugin_of_trainer("mine") == "good"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
        ("this is no Python", ["SyntaxError"]),
        ("import sys; sys.exit(3)", ["sys.exit(3)", "remove"]),
        ("raise BaseException('odd')", ["BaseException", "odd"]),
        (
            "from opd_daemon import hookimpl\n@hookimpl\ndef opd_trainer(): return []",
            ["opd_trainer is no hook", "opd_trainers"],
        ),
        ("from opd_daemon import hookimpl\n@hookimpl\ndef opd_event(evnt): pass", ["opd_event", "evnt"]),
        ("from opd_daemon import hookimpl\n@hookimpl\nasync def opd_event(event): pass", ["opd_event", "async def"]),
        ("def opd_event(event): pass", ["opd_event", "@opd_daemon.hookimpl"]),
        ("x = 1", ["no function marked @opd_daemon.hookimpl"]),
        ("from opd_daemon import hookimpl\n@hookimpl\ndef opd_trainers(): return None or 7", ["returned 7"]),
        ("from opd_daemon import hookimpl\n@hookimpl\ndef opd_trainers(): return ['mine']", ["'mine'", "TrainerInfo"]),
        ("from opd_daemon import hookimpl\n@hookimpl\ndef opd_trainers(): return 1 / 0", ["ZeroDivisionError"]),
        (TRAINER.format(name="../mine"), ["'../mine'", "letters"]),
        (TRAINER.replace("lambda: None", "None").format(name="mine"), ["'mine'", "factory"]),
        (TRAINER.replace("lambda: None", "print, dict").format(name="mine"), ["'mine'", "pydantic"]),
    ],
)
def test_a_broken_plugin_is_reported_and_the_others_work(install: Install, code: str, words: list[str]) -> None:
    install("broken", code)
    install("good", TRAINER.format(name="mine"))
    registry = PluginRegistry.discover({"broken", "good"})
    error = only_failure(registry)
    assert "'broken'" in error
    assert "opd-broken 2.5" in error
    for word in words:
        assert word in error
    assert list(registry.trainers) == ["mine"]


def test_ctrl_c_during_an_import_is_no_broken_plugin(install: Install) -> None:
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        PluginRegistry.discover({"slow"})


def test_two_plugins_of_one_name_the_second_is_refused(install: Install) -> None:
    install("one", TRAINER.format(name="first"), plugin="same")
    install("two", TRAINER.format(name="second"), plugin="same")
    registry = PluginRegistry.discover({"same"})
    assert list(registry.trainers) == ["first"]
    assert "already called 'same'" in only_failure(registry)


def test_two_trainers_of_one_name_the_second_plugin_is_refused(install: Install) -> None:
    install("one", TRAINER.format(name="mine"))
    install("two", TRAINER.format(name="mine"))
    registry = PluginRegistry.discover({"one", "two"})
    assert registry.plugin_of_trainer("mine") == "one"
    assert "trainer 'mine' is offered by another plugin" in only_failure(registry)


def test_a_divergence_from_its_own_package_is_found(install: Install) -> None:
    install("far", DIVERGENCE.format(name="renyi", signals=("exact",)))
    registry = PluginRegistry.discover({"far"})
    [plugin] = registry.loaded
    assert (plugin.hooks, plugin.trainers, plugin.divergences) == (("opd_divergences",), (), ("renyi",))
    assert registry.divergences["renyi"].summary == "Far apart."
    assert registry.plugin_of_divergence("renyi") == "far"
    assert registry.plugin_of_divergence("jsd") == ""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (DIVERGENCE.format(name="jsd", signals=("exact",)), "divergence 'jsd' is offered by another plugin, or by opd"),
        (DIVERGENCE.format(name="no name", signals=("exact",)), "is no name"),
        (
            DIVERGENCE.format(name="renyi", signals=("half",)),
            "has signals ('half',); give some of exact, sampled, sparse",
        ),
        (DIVERGENCE.format(name="renyi", signals=()), "has signals ()"),
        ("from opd_daemon import hookimpl\n@hookimpl\ndef opd_divergences(): return ['kl']", "DivergenceInfo"),
    ],
)
def test_a_broken_divergence_is_reported_and_the_others_work(install: Install, code: str, words: str) -> None:
    install("broken", code)
    install("good", DIVERGENCE.format(name="mine", signals=("exact", "sparse")))
    registry = PluginRegistry.discover({"broken", "good"})
    error = only_failure(registry)
    assert "opd_divergences" in error
    assert words in error
    assert list(registry.divergences) == ["mine"]


def test_two_divergences_of_one_name_the_second_plugin_is_refused(install: Install) -> None:
    for name in ("one", "two"):
        install(name, DIVERGENCE.format(name="mine", signals=("exact",)))
    registry = PluginRegistry.discover({"one", "two"})
    assert registry.plugin_of_divergence("mine") == "one"
    assert "divergence 'mine' is offered by another plugin" in only_failure(registry)


def test_what_a_plugin_prints_stays_out_of_standard_output(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("loud", "print('hello')\n" + TRAINER.format(name="mine"))
    PluginRegistry.discover({"loud"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_the_environment_chooses_plugins(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one", TRAINER.format(name="first"))
    install("two", TRAINER.format(name="second"))
    monkeypatch.setenv("OPD_PLUGINS", " two , none")
    assert list(PluginRegistry.discover().trainers) == ["second"]
    monkeypatch.setenv("OPD_PLUGINS", "")
    assert PluginRegistry.discover().loaded == ()


def test_an_unknown_trainer_is_answered_with_the_known_and_the_failed(install: Install) -> None:
    install("good", TRAINER.format(name="mine"))
    install("broken", "import no_such_module")
    with pytest.raises(OpdError) as caught:
        PluginRegistry.discover({"good", "broken"}).trainer("yours")
    assert caught.value.reason is Reason.TRAINER_NOT_FOUND
    assert "'yours'" in str(caught.value)
    assert "mine" in str(caught.value)
    assert "broken" in str(caught.value)


def test_a_plugin_may_refuse_a_run(install: Install) -> None:
    install(
        "policy",
        "from opd_daemon import RunRefused, hookimpl\n@hookimpl\n"
        "def opd_before_run_started(run):\n    raise RunRefused(f'{run.run_id} comes at night')",
    )
    with pytest.raises(OpdError) as caught:
        PluginRegistry.discover({"policy"}).before_run_started(RUN)
    assert caught.value.reason is Reason.RUN_REFUSED
    assert str(caught.value) == "plugin 'policy' refuses the run: r1 comes at night"


def test_a_policy_that_fails_lets_no_run_through(install: Install) -> None:
    install("policy", "from opd_daemon import hookimpl\n@hookimpl\ndef opd_before_run_started(): raise SystemExit(1)")
    with pytest.raises(OpdError, match="opd_before_run_started failed, and the daemon's log says how") as caught:
        PluginRegistry.discover({"policy"}).before_run_started(RUN)
    assert caught.value.reason is Reason.RUN_REFUSED


LISTENER = """
import os
from opd_daemon import hookimpl

heard = []
{before}

@hookimpl
def opd_event(event):
    {body}
    heard.append(event.revision)

@hookimpl
def opd_after_run_finished(run):
    heard.append(run.run_id)

@hookimpl
def opd_daemon_stopping():
    heard.append("bye")
"""


def heard(name: str) -> list[object]:
    found: list[object] = sys.modules[f"throwaway_{name}"].heard
    return found


def test_listeners_hear_everything_in_order_and_the_end(install: Install) -> None:
    install("ear", LISTENER.format(before="", body=""))
    registry = PluginRegistry.discover({"ear"})
    for revision in range(1, 6):
        registry.notify_event(replace(EVENT, revision=revision))
    registry.after_run_finished(RUN)
    registry.daemon_stopping()
    assert heard("ear") == [1, 2, 3, 4, 5, "r1", "bye"]


def test_a_hook_that_fails_three_times_in_a_row_is_left_alone(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("weak", LISTENER.format(before="calls = []", body="calls.append(1); raise SystemExit"))
    install("ear", LISTENER.format(before="", body=""))
    registry = PluginRegistry.discover({"weak", "ear"})
    for revision in range(1, 6):
        registry.notify_event(replace(EVENT, revision=revision))
    registry.after_run_finished(RUN)
    registry.daemon_stopping()
    assert len(sys.modules["throwaway_weak"].calls) == 3
    assert heard("weak") == ["r1", "bye"]
    assert heard("ear") == [1, 2, 3, 4, 5, "r1", "bye"]
    assert "not called again" in caplog.text


def test_a_success_between_failures_forgives_them(install: Install) -> None:
    install("weak", LISTENER.format(before="", body="assert event.revision % 3 == 0"))
    registry = PluginRegistry.discover({"weak"})
    for revision in range(1, 10):
        registry.notify_event(replace(EVENT, revision=revision))
    registry.daemon_stopping()
    assert heard("weak") == [3, 6, 9, "bye"]


def test_a_hook_that_hangs_holds_up_neither_others_nor_the_end(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    gate = "import threading\ngate = threading.Event()"
    install("stuck", LISTENER.format(before=gate, body="gate.wait()"))
    install("ear", LISTENER.format(before="", body=""))
    registry = PluginRegistry.discover({"stuck", "ear"})
    for revision in range(1, QUEUE_LENGTH + 10):
        registry.notify_event(replace(EVENT, revision=revision))
    registry.daemon_stopping(timeout=3.0)
    assert heard("ear")[-1] == "bye"
    assert "dropped" in caplog.text
    assert "left behind" in caplog.text
    thread = next(entry for entry in threading.enumerate() if entry.name == "plugin stuck")
    sys.modules["throwaway_stuck"].gate.set()
    thread.join(0.1)


def test_looking_at_plugins_starts_no_thread(install: Install) -> None:
    install("ear", LISTENER.format(before="", body=""))
    PluginRegistry.discover({"ear"})
    assert not [entry for entry in threading.enumerate() if entry.name == "plugin ear"]


def test_public_names_load_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, opd_daemon; opd_daemon.hookimpl; opd_daemon.OpdError; "
        "heavy = {'numpy', 'pydantic', 'mlx', 'grpc'} & set(sys.modules); assert not heavy, heavy; "
        "opd_daemon.TrainerInfo; opd_daemon.RunRefused"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
