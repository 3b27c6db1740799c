"""Named places in the code where a test can let this process die, fail or wait: the points that matter for recovery.

Nothing here acts in production. A point looks at one name that is None unless *both* variables were set when the
process started: `OPD_FAILPOINTS`, which says what to do, and `OPD_TEST_HARNESS=1`, which only the test harness sets.

    OPD_FAILPOINTS="store.commit.before=kill@3;disk.write=error:ENOSPC@1+"

An entry is `name=action`, with `@n` at the n-th time this process gets there (the first by default), with `@n+` from
then on. Actions: `kill` (SIGKILL to itself), `exit` (status 70, no clean-up), `error:NAME` (an OSError of that errno),
`sleep:SECONDS`, `pause` (SIGSTOP to itself). `OPD_FAILPOINTS_LOG` names a file that gets a line for each point that
acted, so that a test can tell whether it did.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

POINTS: dict[str, str] = {
    "store.commit.before": "a transaction is written, but not committed",
    "store.commit.after": "a transaction is committed, and nobody knows yet",
    "store.state": "a run's events are in the transaction, its new state is not",
    "store.compact": "old events are deleted in the transaction, the new beginning is not written",
    "store.rewind": "metrics of a run that is resumed are forgotten, its state is the old one",
    "events.publish": "events are durable and seen by nobody",
    "run.accept.config": "an accepted run's file is written, the store doesn't know the run",
    "run.accept.stored": "the store knows an accepted run, its file has no final name",
    "run.resume.stored": "a resumed run is PENDING, nobody looks for pending runs yet",
    "run.stop.stored": "a run is STOPPING, its worker has no time limit yet",
    "run.delete.stored": "a deleted run is forgotten, its files are there",
    "run.delete.files": "a deleted run has lost some of its files",
    "worker.started": "a worker process exists that nobody remembers",
    "worker.recorded": "a worker is remembered, and waits to be told to begin",
    "worker.ended": "a worker has ended, its run doesn't know",
    "worker.forgotten": "a worker has ended and is forgotten",
    "worker.outcome.before": "a worker's work is done, its outcome is not reported",
    "worker.outcome.after": "a worker's outcome is stored, the process is still there",
    "recover.orphans": "an earlier daemon's workers are ended, and still remembered",
    "recover.interrupted": "some of an earlier daemon's live runs are marked INTERRUPTED",
    "discovery.write": "the discovery file is written, it has no name yet",
    "drain.health": "the daemon says NOT_SERVING, runs go on",
    "drain.runs": "runs are at rest, watches are open",
    "teacher.load": "the teacher's files are about to be read",
    "disk.write": "a file or a line is about to be written",
    "disk.rename": "a file is written under a temporary name",
    "folder.filled": "a folder is complete under a temporary name",
    "folder.moved": "the old folder has made way, the new one is not in its place",
    "folder.hidden": "a folder that is to go has a hidden name and all its files",
    "folder.placed": "the new folder is in place, the old one is still there",
    "checkpoint.saved": "a checkpoint is in place, those it supersedes are still there",
    "checkpoint.named": "`best/` or `final/` is about to be written",
    "journal.append": "a row is in the file, its event is not reported",
    "rollouts.append": "some rollouts of a step are in the file",
    "adapter.copy": "some files of an adapter are at the output path",
    "adapter.stream": "some pieces of an adapter have been sent",
    "report.page": "a report's page is written, its pictures are not",
    "cache.write": "a teacher's answer is written under a temporary name",
    "cache.index": "a teacher's answer has its name and is not indexed",
}

EXIT_STATUS = 70


@dataclass(frozen=True, slots=True)
class Action:
    """What happens at a point, from the `first` time on when `onwards`, else only then."""

    what: str
    argument: str = ""
    first: int = 1
    onwards: bool = False

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read `action[:argument][@n[+]]`. Raises ValueError."""
        action, _, when = text.partition("@")
        what, _, argument = action.partition(":")
        if what not in {"kill", "exit", "error", "sleep", "pause"}:
            raise ValueError(f"{text}: use kill, exit, error:NAME, sleep:SECONDS or pause")
        return cls(what, argument, int(when.rstrip("+") or 1), when.endswith("+"))

    def act(self) -> None:
        """Do it."""
        match self.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "pause":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(EXIT_STATUS)
            case "sleep":
                time.sleep(float(self.argument))
            case _:
                number = getattr(errno, self.argument)
                raise OSError(number, os.strerror(number))


class Armed:
    """The points that act, and how often each was reached. Thread-safe."""

    def __init__(self, actions: Mapping[str, Action], log: str = "") -> None:
        if strange := set(actions) - set(POINTS):
            raise ValueError(f"{', '.join(sorted(strange))}: no failpoint of this name")
        self.reached = dict.fromkeys(POINTS, 0)
        self._actions = actions
        self._log = log
        self._lock = threading.Lock()

    def reach(self, name: str) -> None:
        """Count, and act if it is time."""
        with self._lock:
            self.reached[name] += 1
            count = self.reached[name]
        action = self._actions.get(name)
        if action and (count == action.first or (action.onwards and count > action.first)):
            self._note(name)
            action.act()

    def _note(self, name: str) -> None:
        if self._log:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, f"{name}\n".encode())
            os.close(descriptor)


_armed: Armed | None = None


def hit(name: str) -> None:
    """The process is at this point."""
    if _armed is not None:
        _armed.reach(name)


def arm(environment: Mapping[str, str]) -> Armed | None:
    """Take the points from an environment instead; None, and nothing acts, unless the harness's mark is in it."""
    global _armed  # noqa: PLW0603 - one process, one set of points
    written = environment.get("OPD_FAILPOINTS")
    if written is None or environment.get("OPD_TEST_HARNESS") != "1":
        _armed = None
        return None
    entries = (entry.partition("=") for entry in written.split(";") if entry)
    actions = {name.strip(): Action.parse(action.strip()) for name, _, action in entries}
    _armed = Armed(actions, environment.get("OPD_FAILPOINTS_LOG", ""))
    return _armed


arm(os.environ)
