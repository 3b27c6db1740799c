"""Following the event log without gap or repetition, over lost connections and restarts of the daemon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from opd_daemon.client.connection import Connection, not_running
from opd_daemon.errors import Code, OpdError
from opd_daemon.types import Event, Gauges
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc
from opd_daemon.wire.events import event_from_proto, gauges_from_proto

FIRST_DELAY = 0.1
LONGEST_DELAY = 2.0


class Watch:
    """One reader of the log. `cursor` is the revision up to which everything has been handed out."""

    def __init__(
        self,
        connection: Connection,
        after_revision: int | None,
        run_id: str,
        store_id: str,
        *,
        patience: float,
        on_lost: Callable[[OpdError], None] | None,
    ) -> None:
        self.cursor = after_revision
        self.store_id = store_id
        self._connection = connection
        self._run_id = run_id
        self._patience = patience
        self._on_lost = on_lost

    def __iter__(self) -> Iterator[Event | Gauges]:
        delay, lost_at = FIRST_DELAY, 0.0
        while True:
            try:
                for item in self._once():
                    delay, lost_at = FIRST_DELAY, 0.0
                    yield from item
                lost = not_running(self._connection.home)  # a watch has no end of its own
            except OpdError as error:
                if error.code is not Code.UNAVAILABLE and not self._connection.outdated(error):
                    raise
                lost = error
            if not lost_at:
                lost_at = time.monotonic()
                if self._on_lost:
                    self._on_lost(lost)
            if time.monotonic() - lost_at > self._patience:
                raise not_running(self._connection.home)
            # Not all at the same moment: a daemon that comes back meets everyone who watched it before.
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY)
            self._connection.renew()

    def _once(self) -> Iterator[list[Event | Gauges]]:
        """The messages of one connection. The cursor moves as soon as the events of a message are handed out."""
        request = pb.WatchEventsRequest(
            after_revision=self.cursor, run_id=self._run_id, expected_store_id=self.store_id
        )
        for message in self._connection.stream(rpc.RunServiceStub, "WatchEvents", request):
            match message.WhichOneof("item"):
                case "started":
                    self.store_id = message.started.store_id
                    self.cursor = message.started.revision if self.cursor is None else self.cursor
                    yield []
                case "events":
                    known = [event_from_proto(event) for event in message.events.events]
                    self.cursor = message.events.revision
                    yield [event for event in known if event is not None]
                case "bookmark":
                    self.cursor = message.bookmark.revision
                    yield []
                case "gauges":
                    yield [gauges_from_proto(message.gauges)]
