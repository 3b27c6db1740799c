"""kill -9, again and again: daemon, worker or both, at random times and at random points of the code."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from opd_daemon.failpoints import POINTS
from tests.crash.clients import Follower, User
from tests.crash.model import Findings, Promises, examine
from tests.crash.stage import Daemon, until

# A worker needs most of a second before its first step.
SHORT_LIFE, LONG_LIFE, LAST_LIFE = (0.02, 0.6), (0.8, 2.2), 2.5
ORPHAN_SECONDS = 8.0
EXAMINED_EVERY = 20
AIMS = ("daemon", "worker", "both", "point")


@dataclass
class Tally:
    """What happened."""

    cycles: int = 0
    aims: Counter[str] = field(default_factory=Counter)
    workers_killed: int = 0
    points: Counter[str] = field(default_factory=Counter)
    recovery_seconds: list[float] = field(default_factory=list)


class Cycles:
    """One home, many deaths."""

    def __init__(self, root: Path, seed: int) -> None:
        self.daemon = Daemon(root)
        self.promises = Promises()
        self.findings = Findings()
        self.tally = Tally()
        self._random = random.Random(seed)
        self._user = User(root, self.promises, seed)
        self._follower: Follower | None = None

    def run(self, cycles: int) -> None:
        """Do so many cycles, and end with a daemon that is stopped in order."""
        try:
            for _ in range(cycles):
                self._cycle()
                if self.tally.cycles % EXAMINED_EVERY == 0:
                    self._examine()
            self._last_life()
        finally:
            if self._follower:
                self._follower.close()
            self.daemon.end()
        self.tally.points = Counter(self.daemon.points_hit())

    def figures(self) -> str:
        """One line for people."""
        tally, findings = self.tally, self.findings
        recovery = statistics.quantiles(tally.recovery_seconds, n=100)
        return (
            f"{tally.cycles} kill -9 cycles ({dict(tally.aims)}), {tally.workers_killed} workers killed, "
            f"{sum(tally.points.values())} deaths at {len(tally.points)} points; {findings.events} events, "
            f"{findings.acknowledged} acknowledged; lost {len(findings.lost)}, twice {len(findings.twice)}, "
            f"disordered {len(findings.disordered)}, illegal {len(findings.illegal)}, half written "
            f"{len(findings.half_written)}, orphans {len(findings.orphans)}; start to serving: median "
            f"{recovery[49]:.2f} s, p99 {recovery[98]:.2f} s"
        )

    def _cycle(self) -> None:
        aim = self._random.choice(AIMS)
        points = f"{self._random.choice(list(POINTS))}=kill@{self._random.randint(1, 12)}" if aim == "point" else ""
        started = time.monotonic()
        self.daemon.start(points, wait=False)
        if self.daemon.until_serving():
            self.tally.recovery_seconds.append(time.monotonic() - started)
            self._follower = self._follower or Follower(self.daemon)
            self._expect_no_orphans()
            self._user.act_for(self.daemon, self._random.uniform(*self._random.choice((SHORT_LIFE, LONG_LIFE))))
        self._kill(aim)
        self.tally.cycles += 1
        self.tally.aims[aim] += 1

    def _kill(self, aim: str) -> None:
        workers = self.daemon.workers() if aim in ("worker", "both") else []
        for worker in workers:
            try:
                worker.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            self.tally.workers_killed += 1
        if aim == "worker" and self._random.random() < 0.5:
            self._user.act_for(self.daemon, self._random.uniform(0.0, 0.5))
        self._expect_no_end_of_its_own(aim)
        self.daemon.kill()

    def _expect_no_end_of_its_own(self, aim: str) -> None:
        """Only a point that kills ends a daemon before we do; one that can't start, or fails, is no kill -9."""
        if self.daemon.alive:
            return
        code = self.daemon.wait()
        said = self.daemon.log.read_text()[-3000:]
        assert aim == "point", f"cycle {self.tally.cycles}: the daemon ended by itself with {code}:\n{said}"
        assert code == -signal.SIGKILL, f"cycle {self.tally.cycles}: a point to die at ended it with {code}:\n{said}"

    def _expect_no_orphans(self) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while orphans := self.daemon.orphans():
            if time.monotonic() > deadline:
                self.findings.orphans += [f"cycle {self.tally.cycles}: pid {process.pid}" for process in orphans]
                return
            time.sleep(0.02)

    def _examine(self) -> None:
        examine(self.daemon.home, self.promises, self.findings)
        assert not self.findings.broken, self.findings.broken[:10]

    def _last_life(self) -> None:
        """Everything comes to rest, the follower has seen all of it, and a stop in order ends the daemon."""
        self.daemon.start()
        follower = self._follower = self._follower or Follower(self.daemon)
        self._user.act_for(self.daemon, LAST_LIFE)
        with self.daemon.client() as client:
            until(lambda: all(run.state.resting for run in client.runs()), 60.0, "all runs at rest")
            _, revision = client.run(next(client.runs()).run_id)
        until(lambda: len(follower.revisions) >= revision or follower.fault, 60.0, "the follower caught up")
        assert follower.fault is None, follower.fault
        self.findings.disordered += follower.gaps()
        assert self.daemon.stop() == 0
        until(lambda: not self.daemon.workers(), 10.0, "no worker is left")
        self._examine()
