"""The most memory a worker may take, where the system can be told to refuse more."""

from __future__ import annotations

import sys


def limit_process_memory(limit_bytes: int) -> None:
    """Let the system refuse this process more than so many bytes of its own; 0 sets no limit.

    Only Linux can do so: there data, heap and stacks count, files mapped into memory don't. On macOS MLX alone keeps
    to the limit (see `distill.memory`). MLX on a Linux CPU dies of a refused allocation (SIGSEGV), as it writes
    without looking. Call it before threads start.
    """
    if limit_bytes and sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def lift_memory_limit() -> None:
    """Take the limit away again, so that a process whose memory ran out can save its work and say so."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
