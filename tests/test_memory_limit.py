"""Processes of many threads keep few heaps, and those that train keep what they free."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_daemon.memory_limit import TUNABLES, training_environment

THREADS = """
import ctypes, sys, threading
from opd_daemon.memory_limit import share_heaps

share_heaps()
together = threading.Barrier(8)

def take():
    together.wait()
    held = [bytearray(5000) for _ in range(100)]
    together.wait()
    return held

threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
process = ctypes.CDLL(None)
process.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(process.fopen(sys.argv[1].encode(), b"w"))
process.malloc_info(0, file)
process.fclose(file)
"""

# A large block, written, freed and written again: how many pages each time had to be asked for.
BLOCKS = """
import resource
import numpy as np

def asked():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.empty(1 << 26, np.uint8)[:] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

asked()
print(asked())
"""

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc"
)


@needs_glibc
@pytest.mark.parametrize(("setting", "heaps"), [(None, 2), ("3", 3)])
def test_threads_share_heaps(tmp_path: Path, setting: str | None, heaps: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    if setting:
        environment["MALLOC_ARENA_MAX"] = setting
    told = tmp_path / "heaps.xml"
    subprocess.run([sys.executable, "-c", THREADS, str(told)], env=environment, check=True, timeout=60)
    assert told.read_text().count("<heap ") == heaps


@needs_glibc
def test_freed_blocks_are_kept_for_the_next_step() -> None:
    bare = {name: value for name, value in os.environ.items() if name != TUNABLES}
    plain, keeping = (
        int(subprocess.run([sys.executable, "-c", BLOCKS], env=env, check=True, timeout=60, capture_output=True).stdout)
        for env in (bare, training_environment(bare))
    )
    assert keeping < 100 <= plain


def test_what_a_person_sets_stands() -> None:
    own = {TUNABLES: "glibc.malloc.check=1", "HOME": "/home/someone"}
    assert training_environment(own) == own
