"""A stage that shows nothing."""

from __future__ import annotations

from opd_daemon.client import Client
from opd_daemon.types import Event, EventKind, Run, RunState


class QuietStage:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.followed = False

    def say(self, text: str) -> None:
        self.lines.append(text)

    def load_teacher(self, client: Client, path: str) -> None:
        for _ in client.load_teacher(path):
            pass

    def follow(self, client: Client, run: Run) -> None:
        for item in client.watch(0, run.run_id):
            if isinstance(item, Event) and item.kind is EventKind.RUN_STATE and RunState(item.payload["state"]).resting:
                break
        self.followed = True
