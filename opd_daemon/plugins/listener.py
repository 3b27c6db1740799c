"""Telling a plugin what happens, on a thread of its own, so that a slow or broken one holds nobody up."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from typing import Any

from opd_daemon.plugins.discovery import LoadedPlugin

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 10_000
STRIKES = 3
NOTIFICATIONS = ("opd_event", "opd_after_run_finished", "opd_daemon_stopping")


class Listener:
    """Calls one plugin's notification hooks in order. When its queue is full, what comes is dropped and counted."""

    def __init__(self, plugin: LoadedPlugin) -> None:
        self._plugin = plugin
        self._calls: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(QUEUE_LENGTH)
        self._strikes = dict.fromkeys(NOTIFICATIONS, 0)
        self._dropped = 0
        self._ending = False
        # A daemon thread: a plugin that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"plugin {plugin.name}", daemon=True)
        self._thread.start()

    def notify(self, hook: str, **arguments: Any) -> None:
        """Queue one call; returns at once."""
        if hook not in self._plugin.hooks or self._strikes[hook] >= STRIKES:
            return
        try:
            self._calls.put_nowait((hook, arguments))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning(
                    "plugin %r is %d calls behind: what comes now is dropped", self._plugin.name, QUEUE_LENGTH
                )

    def end(self) -> None:
        """Let the plugin work off its queue and say goodbye; returns at once."""
        self._ending = True
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)

    def join(self, deadline: float) -> None:
        """Wait for the goodbye until `deadline` on the monotonic clock."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            logger.warning("plugin %r is still busy and is left behind", self._plugin.name)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._call(*call)
            # With a full queue there was no room for the last word.
            if self._ending and self._calls.empty():
                break
        if "opd_daemon_stopping" in self._plugin.hooks:
            self._call("opd_daemon_stopping", {})

    def _call(self, hook: str, arguments: dict[str, Any]) -> None:
        if self._strikes[hook] >= STRIKES:
            return
        try:
            getattr(self._plugin.calls, hook)(**arguments)
        except BaseException as fault:
            self._strikes[hook] += 1
            end = f"; {STRIKES} in a row, so it is not called again" if self._strikes[hook] >= STRIKES else ""
            logger.exception("plugin %r: %s failed with %s%s", self._plugin.name, hook, type(fault).__name__, end)
        else:
            self._strikes[hook] = 0
