"""Finding and loading plugins so that a broken one hurts nobody but itself."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from opd_daemon import hookspecs
from opd_daemon.hookspecs import ENTRY_POINT_GROUP, PROJECT
from opd_daemon.names import RULE, is_identifier
from opd_daemon.trainer import DivergenceInfo, TrainerInfo

logger = logging.getLogger(__name__)

ALLOW_LIST = "OPD_PLUGINS"
SLOW_SECONDS = 1.0
SIGNALS = frozenset({"exact", "sparse", "sampled"})
HOOKS = tuple(sorted(name for name in vars(hookspecs) if name.startswith("opd_")))


class PluginFault(Exception):
    """Why a plugin can't be used: one line naming the hook and the cure."""


@dataclass(frozen=True, slots=True)
class FailedPlugin:
    """A plugin that is not in use, and why, in one line."""

    name: str
    distribution: str
    version: str
    error: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin in use. `calls` is a hook caller of its own, so that its failures stay its own."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    trainers: tuple[str, ...]
    seconds: float
    calls: Any = field(repr=False, compare=False)
    offered: tuple[TrainerInfo, ...] = field(default=(), repr=False, compare=False)
    offered_divergences: tuple[DivergenceInfo, ...] = field(default=(), repr=False, compare=False)

    @property
    def divergences(self) -> tuple[str, ...]:
        """Names of the divergences it offers."""
        return tuple(divergence.name for divergence in self.offered_divergences)


@dataclass(frozen=True, slots=True)
class TakenNames:
    """Names that plugins loaded earlier, and for divergences opd itself, hold already."""

    plugins: Collection[str] = ()
    trainers: Collection[str] = ()
    divergences: Collection[str] = ()


def allowed_plugins() -> frozenset[str] | None:
    """The plugins `$OPD_PLUGINS` names, separated by commas; None when it is not set and all are wanted."""
    names = os.environ.get(ALLOW_LIST)
    return None if names is None else frozenset(name.strip() for name in names.split(",") if name.strip())


def installed_plugins(allowed: Collection[str] | None) -> list[EntryPoint]:
    """Entry points of plugins, by name."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    wanted = [entry for entry in found if allowed is None or entry.name in allowed]
    return sorted(wanted, key=lambda entry: (entry.name, _distribution(entry)))


def load_plugin(entry: EntryPoint, taken: TakenNames) -> LoadedPlugin | FailedPlugin:
    """Load one plugin. Raises nothing but KeyboardInterrupt."""
    distribution, version = _distribution(entry), entry.dist.version if entry.dist else ""
    start = time.perf_counter()
    try:
        # Whatever a plugin prints belongs to the log: standard output may be read by a program.
        with redirect_stdout(sys.stderr):
            calls, hooks = _register(entry, taken.plugins)
            offered = _offered(calls.opd_trainers(), "opd_trainers", TrainerInfo, taken.trainers)
            divergences = _offered(calls.opd_divergences(), "opd_divergences", DivergenceInfo, taken.divergences)
    except KeyboardInterrupt:
        raise
    except BaseException as fault:
        error = f"plugin {entry.name!r} ({distribution} {version}): {_one_line(fault, entry)}"
        logger.debug("%s", error, exc_info=True)
        return FailedPlugin(entry.name, distribution, version, error, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if seconds > SLOW_SECONDS:
        logger.warning("plugin %r took %.1f s to load: import heavy modules inside functions", entry.name, seconds)
    names = tuple(trainer.name for trainer in offered)
    return LoadedPlugin(entry.name, distribution, version, hooks, names, seconds, calls, offered, divergences)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else ""


def _register(entry: EntryPoint, taken: Collection[str]) -> tuple[Any, tuple[str, ...]]:
    if entry.name in taken:
        raise PluginFault(f"another plugin is already called {entry.name!r}; uninstall one of the two")
    plugin = entry.load()
    _check_functions(plugin)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, entry.name)
    manager.check_pending()
    hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
    if not hooks:
        raise PluginFault(f"{entry.value} has no function marked @opd_daemon.hookimpl; known hooks: {', '.join(HOOKS)}")
    return manager.hook, hooks


def _check_functions(plugin: Any) -> None:
    for name, function in inspect.getmembers(plugin, inspect.isroutine):
        if not name.startswith("opd_"):
            continue
        if name not in HOOKS:
            raise PluginFault(f"{name} is no hook; known hooks: {', '.join(HOOKS)}")
        if not hasattr(function, f"{PROJECT}_impl"):
            raise PluginFault(f"{name} is not marked as a hook; put @opd_daemon.hookimpl above it")
        if inspect.iscoroutinefunction(function):
            raise PluginFault(f"{name} is 'async def'; hooks are plain functions")


Info = TypeVar("Info", TrainerInfo, DivergenceInfo)


def _offered(answers: Iterable[Any], hook: str, kind: type[Info], taken: Collection[str]) -> tuple[Info, ...]:
    found: list[Info] = []
    for offered in answers:
        if not isinstance(offered, Iterable):
            raise PluginFault(f"{hook} returned {offered!r:.80}; return a list of opd_daemon.{kind.__name__}")
        for info in offered:
            if not isinstance(info, kind):
                raise PluginFault(f"{hook} returned {info!r:.80}; each entry is an opd_daemon.{kind.__name__}")
            _check_info(info, hook, {*taken, *(entry.name for entry in found)})
            found.append(info)
    return tuple(found)


def _check_info(info: TrainerInfo | DivergenceInfo, hook: str, taken: Collection[str]) -> None:
    where = f"{hook}: {type(info).__name__.removesuffix('Info').lower()} {info.name!r:.80}"
    if not is_identifier(str(info.name)):
        raise PluginFault(f"{where} is no name: use {RULE}")
    if info.name in taken:
        raise PluginFault(f"{where} is offered by another plugin, or by opd itself; choose another name")
    if not callable(info.factory):
        raise PluginFault(f"{where} has a factory that can't be called; give a function")
    options: object = info.options
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        raise PluginFault(f"{where} has options that are no pydantic model; give a subclass of pydantic.BaseModel")
    signals = getattr(info, "signals", SIGNALS)
    if not signals or not set(signals) <= SIGNALS:
        raise PluginFault(f"{where} has signals {signals!r:.80}; give some of {', '.join(sorted(SIGNALS))}")


def _one_line(fault: BaseException, entry: EntryPoint) -> str:
    text = " ".join(str(fault).split())
    if isinstance(fault, PluginFault):
        return text
    if isinstance(fault, pluggy.PluginValidationError):
        return f"{text}; see opd_daemon.hookspecs for names and arguments"
    if isinstance(fault, SystemExit):
        return f"importing {entry.value} calls sys.exit({fault.code!r}); remove that from the module"
    return f"importing {entry.value} fails with {type(fault).__name__}: {text}"
