"""The plugins of this process: which are in use, what they offer, and calling them."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable

from opd_daemon.errors import OpdError, Reason
from opd_daemon.plugins.discovery import (
    FailedPlugin,
    LoadedPlugin,
    TakenNames,
    allowed_plugins,
    installed_plugins,
    load_plugin,
)
from opd_daemon.plugins.listener import NOTIFICATIONS, Listener
from opd_daemon.trainer import BUILT_IN_DIVERGENCES, DivergenceInfo, RunRefused, TrainerInfo
from opd_daemon.types import Event, Run

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0


class PluginRegistry:
    """Plugins in use (`loaded`), plugins that could not be used (`failed`), and what they offer by name."""

    def __init__(self, loaded: Iterable[LoadedPlugin] = (), failed: Iterable[FailedPlugin] = ()) -> None:
        self.loaded = tuple(loaded)
        self.failed = tuple(failed)
        self.trainers: dict[str, TrainerInfo] = {
            trainer.name: trainer for plugin in self.loaded for trainer in plugin.offered
        }
        self.divergences: dict[str, DivergenceInfo] = {
            divergence.name: divergence for plugin in self.loaded for divergence in plugin.offered_divergences
        }
        self._listeners: list[Listener] | None = None

    @classmethod
    def discover(cls, allowed: Collection[str] | None = None) -> PluginRegistry:
        """Load every installed plugin, or those named by `allowed`, by default `$OPD_PLUGINS`."""
        loaded: list[LoadedPlugin] = []
        failed: list[FailedPlugin] = []
        for entry in installed_plugins(allowed_plugins() if allowed is None else allowed):
            taken = TakenNames(
                [plugin.name for plugin in loaded],
                [name for plugin in loaded for name in plugin.trainers],
                [*BUILT_IN_DIVERGENCES, *(name for plugin in loaded for name in plugin.divergences)],
            )
            plugin = load_plugin(entry, taken)
            if isinstance(plugin, LoadedPlugin):
                loaded.append(plugin)
            else:
                failed.append(plugin)
        return cls(loaded, failed)

    def trainer(self, name: str) -> TrainerInfo:
        """The trainer of that name.

        Raises:
            OpdError: TRAINER_NOT_FOUND naming those there are, and the plugins that failed to load.
        """
        if name in self.trainers:
            return self.trainers[name]
        known = ", ".join(sorted(self.trainers)) or "none is installed; pip install opd-trainers"
        failed = ", ".join(plugin.name for plugin in self.failed)
        hint = f"; these plugins failed to load, see 'opd plugins': {failed}" if failed else ""
        raise OpdError(Reason.TRAINER_NOT_FOUND, f"no trainer {name!r}; there are: {known}{hint}", trainer=name)

    def plugin_of_trainer(self, name: str) -> str:
        """Name of the plugin that offers a trainer; empty when none does."""
        return next((plugin.name for plugin in self.loaded if name in plugin.trainers), "")

    def plugin_of_divergence(self, name: str) -> str:
        """Name of the plugin that offers a divergence; empty for those that are built in."""
        return next((plugin.name for plugin in self.loaded if name in plugin.divergences), "")

    def before_run_started(self, run: Run) -> None:
        """Ask every plugin whether the run may start; blocks while they think.

        Raises:
            OpdError: RUN_REFUSED, also when a plugin fails at it: it may be there to enforce a policy.
        """
        for plugin in self.loaded:
            try:
                plugin.calls.opd_before_run_started(run=run)
            except RunRefused as refusal:
                raise _refused(run, plugin, str(refusal) or "no reason given") from None
            except KeyboardInterrupt:
                raise
            except BaseException as fault:
                logger.warning("plugin %s: opd_before_run_started failed", plugin.name, exc_info=fault)
                why = "opd_before_run_started failed, and the daemon's log says how; repair or uninstall it"
                raise _refused(run, plugin, why) from fault

    def notify_event(self, event: Event) -> None:
        """Hand one event to every plugin that listens; returns at once."""
        self._notify("opd_event", event=event)

    def after_run_finished(self, run: Run) -> None:
        """Tell plugins that a run has come to rest; returns at once."""
        self._notify("opd_after_run_finished", run=run)

    def daemon_stopping(self, timeout: float = STOP_SECONDS) -> None:
        """Let plugins finish what they have and say goodbye; blocks up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        listeners, self._listeners = self._listening(), []
        for listener in listeners:
            listener.end()
        for listener in listeners:
            listener.join(deadline)

    def _notify(self, hook: str, **arguments: object) -> None:
        for listener in self._listening():
            listener.notify(hook, **arguments)

    def _listening(self) -> list[Listener]:
        # Only a daemon notifies; `opd plugins` and the workers look plugins up without starting threads.
        if self._listeners is None:
            self._listeners = [Listener(plugin) for plugin in self.loaded if set(plugin.hooks) & set(NOTIFICATIONS)]
        return self._listeners


def _refused(run: Run, plugin: LoadedPlugin, why: str) -> OpdError:
    message = f"plugin {plugin.name!r} refuses the run: {why}"
    return OpdError(Reason.RUN_REFUSED, message, plugin=plugin.name, run_id=run.run_id)
