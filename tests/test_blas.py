"""OpenBLAS is in place before MLX, or the user reads why not. Each case runs in its own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opd_daemon import blas

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux builds of mlx carry the slow BLAS")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


NEEDS_OPENBLAS = "from opd_daemon import blas; blas.preload(); raise SystemExit(0 if blas.active() else 1)"


@pytest.fixture
def openblas() -> None:
    if subprocess.run([sys.executable, "-c", NEEDS_OPENBLAS], capture_output=True, check=False).returncode:
        pytest.skip("no OpenBLAS on this machine")


@linux_only
def test_preload_is_silent_and_puts_openblas_in_the_global_scope(openblas: None) -> None:
    result = run_python("from opd_daemon import blas; blas.preload(); blas.preload(); print(blas.active())")
    assert result.stdout.split() == ["True"]
    assert result.stderr == ""


@linux_only
@pytest.mark.parametrize("room", ["opd_daemon.distill", "opd_daemon.teacher"])
def test_openblas_comes_right_before_mlx_and_not_with_the_rooms_that_use_it(openblas: None, room: str) -> None:
    code = f"import {room}; from opd_daemon import blas; print(blas.active()); import mlx.nn; print(blas.active())"
    result = run_python(code)
    assert result.stdout.split() == ["False", "True"]
    assert result.stderr == ""


@linux_only
def test_a_room_imported_after_mlx_tells_that_it_is_too_late(openblas: None) -> None:
    result = run_python("import mlx.core, opd_daemon.teacher")
    assert result.stderr.count("mlx was imported before opd_daemon") == 1


@linux_only
def test_mlx_products_run_on_the_preloaded_library(openblas: None) -> None:
    # OpenBLAS keeps a thread pool and a buffer per call; the sharpest observable is that its own symbol wins lookup.
    result = run_python(
        "import ctypes\n"
        "from opd_daemon import blas; blas.preload()\n"
        "import mlx.core as mx\n"
        "product = mx.ones((64, 32)) @ mx.ones((32, 16)); mx.eval(product)\n"
        "symbol = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value\n"
        "spans = (line.split() for line in open('/proc/self/maps'))\n"
        "owner = next(s[-1] for s in spans if int(s[0].split('-')[0], 16) <= symbol < int(s[0].split('-')[1], 16))\n"
        "print(owner, product[0, 0].item())"
    )
    owner, value = result.stdout.split()
    assert "openblas" in owner
    assert float(value) == 32.0


@linux_only
def test_mlx_imported_first_is_one_warning_with_the_cure() -> None:
    result = run_python(
        "import mlx.core\nfrom opd_daemon import blas\n"
        "blas.active = lambda: False\nblas.has_cuda_build = lambda: False\n"
        "blas.preload(); blas.preload()"
    )
    assert len(result.stderr.splitlines()) == 1
    assert "LD_PRELOAD=libopenblas.so.0" in result.stderr


@linux_only
def test_missing_openblas_is_one_warning_with_the_cure() -> None:
    result = run_python(
        "from opd_daemon import blas\n"
        "blas.LIBRARY_NAMES = ('libnosuchblas.so.0',)\nblas.ctypes.util.find_library = lambda name: None\n"
        "blas.has_cuda_build = lambda: False\n"
        "blas.preload(); blas.preload()",
        LD_PRELOAD="",
    )
    assert len(result.stderr.splitlines()) == 1
    assert "apt-get install libopenblas0-pthread" in result.stderr


@linux_only
def test_an_openblas_from_ld_preload_is_kept(openblas: None) -> None:
    result = run_python(
        "from opd_daemon import blas\n"
        "blas.LIBRARY_NAMES = ('libnosuchblas.so.0',)\nblas.ctypes.util.find_library = lambda name: None\n"
        "import mlx.core\nblas.preload(); print(blas.active())",
        LD_PRELOAD="libopenblas.so.0",
    )
    assert result.stdout.split() == ["True"]
    assert result.stderr == ""


def test_nothing_happens_where_mlx_needs_no_help() -> None:
    result = run_python(
        "import sys; sys.platform = 'darwin'\nfrom opd_daemon import blas\n"
        "blas._load = lambda: 1 / 0\nblas.preload(); print('done')"
    )
    assert result.stdout.split() == ["done"]


CORE_NAME = (
    "import ctypes; from opd_daemon import blas; blas.preload(); library = ctypes.CDLL(None)\n"
    "library.openblas_get_corename.restype = ctypes.c_char_p; print(library.openblas_get_corename().decode())"
)


@linux_only
@pytest.mark.skipif("avx2" not in blas._cpu_flags(), reason="a CPU without AVX2 has no better kernels")
def test_kernels_are_those_of_the_cpu_even_if_the_library_is_older(openblas: None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    command = [sys.executable, "-c", CORE_NAME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() in blas.KERNELS


@linux_only
@pytest.mark.skipif("avx2" not in blas._cpu_flags(), reason="a CPU without AVX2 has no Haswell kernels")
def test_kernels_named_by_the_user_stay(openblas: None) -> None:
    assert run_python(CORE_NAME, OPENBLAS_CORETYPE="Haswell").stdout.strip() == "Haswell"
