"""How a daemon tells that memory ended a worker."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from opd_daemon.errors import OUT_OF_MEMORY_SIGNS

CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
SYSTEM_COUNTERS = Path("/proc/vmstat")


def kills_for_memory() -> int:
    """How many processes near this one the kernel has killed for lack of memory; 0 where it doesn't tell.

    Counted in this process's control group, where workers live too, else on the whole machine.
    """
    for path, name in _counters():
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def memory_ended(code: int, last_words: str, *, limited: bool, kills: int) -> bool:
    """Whether a worker that ended with `code`, negative for a signal, without an outcome died of lack of memory.

    last_words: the end of its log. limited: it had a hard limit, under which a segmentation fault is a refused
    allocation. kills: processes killed for lack of memory in its lifetime; a SIGKILL without one came from a person.
    """
    if code == -signal.SIGKILL:
        return kills > 0
    if code == -signal.SIGSEGV and limited and sys.platform == "linux":
        return True
    return code != 0 and bool(OUT_OF_MEMORY_SIGNS.search(last_words))


def _counters() -> list[tuple[Path, str]]:
    found = []
    try:
        groups = CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            found.append((CGROUP_ROOT / path.lstrip("/") / "memory.events", "oom_kill"))
        elif controllers == "memory":
            found.append((CGROUP_ROOT / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill"))
    return [*found, (SYSTEM_COUNTERS, "oom_kill")]
