"""The newest readings of every run: tokens/s, memory. They replace each other and are never stored."""

from __future__ import annotations

from opd_daemon.types import Gauges


class GaugeBoard:
    """Readings by run, numbered as they come: `number` is that of the last one."""

    def __init__(self) -> None:
        self.number = 0
        self._newest: dict[str, tuple[int, Gauges]] = {}

    def put(self, gauges: Gauges) -> None:
        """Replace a run's readings."""
        self.number += 1
        self._newest[gauges.run_id] = (self.number, gauges)

    def forget(self, run_id: str) -> None:
        """A run that rests has no readings."""
        self._newest.pop(run_id, None)

    def since(self, number: int, run_id: str | None) -> list[Gauges]:
        """What came after the `number`-th, of one run or of all, oldest first."""
        fresh = [entry for entry in self._newest.values() if entry[0] > number]
        return [gauges for _, gauges in sorted(fresh, key=lambda entry: entry[0]) if run_id in (None, gauges.run_id)]
