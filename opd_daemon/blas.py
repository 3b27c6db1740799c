"""A fast BLAS for MLX on Linux CPUs, loaded before MLX itself.

The CPU build of MLX for Linux carries the reference BLAS: a 512×576×1536 float32 product runs at about 2 GFLOP/s
instead of more than 100. A real OpenBLAS that is already in the process's global symbol scope takes its place.
So every package that imports MLX says first: `from opd_daemon import blas; blas.preload_with_mlx()`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

logger = logging.getLogger(__name__)

MLX = "mlx.core"
CURE = "install OpenBLAS (Debian, Ubuntu: apt-get install libopenblas0-pthread; Fedora, Arch: package openblas)"

# Fedora's plain libopenblas.so.0 is the single-threaded build, so the threaded name comes first.
LIBRARY_NAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblaso.so.0")
# The fastest of OpenBLAS's single-precision kernels for what an x86 CPU says it can do.
KERNELS = {
    "SkylakeX": frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}),
    "Haswell": frozenset({"avx2", "fma"}),
}
CUDA_DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")


class _BeforeMlx:
    """Stands first in the line of those who find modules: finds none, but sees MLX coming."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> None:
        """Load OpenBLAS if MLX is next."""
        if name == MLX:
            preload()


@cache
def preload_with_mlx() -> None:
    """Have `preload` run right before MLX is imported, by whomever; at once when it was. Once is enough.

    Not earlier, as OpenBLAS starts a thread for every core, and they spin before they sleep.
    """
    if MLX in sys.modules:
        preload()
    else:
        sys.meta_path.insert(0, _BeforeMlx())


@cache
def preload() -> None:
    """Make OpenBLAS answer MLX's matrix products; a second call does nothing.

    Does nothing either on macOS, where MLX has Metal and Accelerate, and with a CUDA build of MLX. Logs one warning
    with the cure when OpenBLAS is missing, or when MLX was imported too early to be helped.
    """
    if sys.platform != "linux" or has_cuda_build() or active():
        return
    if MLX in sys.modules:
        logger.warning(
            "mlx was imported before opd_daemon, so its slow built-in BLAS stays (about 50 times slower): "
            "import opd_daemon.blas and call preload() first, or set LD_PRELOAD=libopenblas.so.0"
        )
        return
    _choose_kernels()
    if not _load():
        logger.warning("no OpenBLAS found, so mlx will run about 50 times slower on this CPU: %s", CURE)


def _choose_kernels() -> None:
    """Name the kernels for this CPU, since an OpenBLAS older than the CPU falls back to those of 2004, 5 times slower.

    Whoever sets OPENBLAS_CORETYPE knows better.
    """
    if kernels := best_kernels():
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)


def best_kernels() -> str:
    """OpenBLAS's name for the fastest kernels this CPU can run; empty where it has none of the newer instructions."""
    flags = set(re.findall(r"\w+", _cpu_flags()))
    return next((kernels for kernels, needed in KERNELS.items() if needed <= flags), "")


def _cpu_flags() -> str:
    """The flags of the first CPU; empty where there are none of that name, as on ARM."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def active() -> bool:
    """Whether an OpenBLAS is in this process's global symbol scope, through `preload` or LD_PRELOAD."""
    # numpy's private OpenBLAS has prefixed names and local scope: it neither shows here nor helps MLX.
    process = ctypes.CDLL(None)
    return hasattr(process, "openblas_get_config") and hasattr(process, "cblas_sgemm")


def kernels() -> str:
    """OpenBLAS's name for the kernels it uses on this CPU; empty where it isn't active or doesn't say."""
    process = ctypes.CDLL(None)
    if not (active() and hasattr(process, "openblas_get_corename")):
        return ""
    process.openblas_get_corename.restype = ctypes.c_char_p
    name: bytes = process.openblas_get_corename()
    return name.decode()


def has_cuda_build() -> bool:
    """Whether MLX is installed in a build for NVIDIA cards."""
    return any(_installed(name) for name in CUDA_DISTRIBUTIONS)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _load() -> bool:
    return any(_open(name) for name in LIBRARY_NAMES) or _open(ctypes.util.find_library("openblas"))


def _open(name: str | None) -> bool:
    if name is None:
        return False
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return active()
