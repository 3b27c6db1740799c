"""What the machine has to compute with."""

from __future__ import annotations

import resource
import sys

import psutil

from opd_daemon import blas
from opd_daemon.doctor.finding import Finding, error, fine, warning
from opd_daemon.readable import size

# Kernels without AVX2: where OpenBLAS is older than the CPU, it takes these.
OLD_KERNELS = frozenset({"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Atom", "Generic", "Katmai"})
LITTLE_MEMORY_BYTES = 2 << 30
FEW_FILES = 1024


def products() -> Finding:
    """Who computes matrix products: Metal on a Mac, CUDA, or a BLAS that knows this CPU."""
    if sys.platform == "darwin":
        return _metal()
    if blas.has_cuda_build():
        return fine("products", "MLX for CUDA")
    blas.preload()
    if not blas.active():
        return warning("products", "MLX computes with its own BLAS, about 50 times slower", blas.CURE)
    kernels = blas.kernels()
    if kernels in OLD_KERNELS and blas.best_kernels():
        cure = f"set OPENBLAS_CORETYPE={blas.best_kernels()}, or install a newer OpenBLAS"
        return warning("products", f"OpenBLAS uses kernels for CPUs of 2004 to 2008 ({kernels})", cure)
    return fine("products", f"OpenBLAS, kernels {kernels or 'unknown'}")


def _metal() -> Finding:
    import mlx.core as mx  # a second of loading that no other check needs

    if mx.metal.is_available():
        return fine("products", "Metal")
    cure = "use a Mac with Apple silicon, and a Python built for arm64"
    return error("products", "MLX finds no Metal device", cure)


def memory() -> Finding:
    """Whether there is room for a model now."""
    found = psutil.virtual_memory()
    text = f"{size(found.available)} of {size(found.total)} available"
    if found.available < LITTLE_MEMORY_BYTES:
        return warning("memory", text, "close other programs, or unload the teacher with 'opd teacher unload'")
    return fine("memory", text)


def open_files() -> Finding:
    """How many files and connections the daemon may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < FEW_FILES:
        cure = f"ulimit -n {FEW_FILES} before 'opd serve' ('opd service install' does it by itself)"
        return warning("open files", f"at most {limit}", cure)
    return fine("open files", "no limit" if limit < 0 else f"at most {limit}")
