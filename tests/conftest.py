"""Fixtures every room's tests share. OpenBLAS comes before the first import of mlx."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opd_daemon import blas

blas.preload()

from tests.tiny import write_tiny_qwen2


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 teacher."""
    return write_tiny_qwen2(tmp_path_factory.mktemp("models") / "teacher", seed=1, layers=3)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 student with the teacher's tokenizer."""
    return write_tiny_qwen2(tmp_path_factory.mktemp("models") / "student", seed=2)


@pytest.fixture(scope="session")
def test_models() -> Path:
    """Where real models stay between test sessions, as their conversion takes seconds and half a gigabyte each."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "opd-daemon-tests"


@pytest.fixture(scope="session")
def smollm2(test_models: Path) -> Path:
    """Folder of the real SmolLM2-135M-Instruct in float32: the demo's teacher."""
    from opd_daemon.demo.smollm2 import convert_teacher

    return convert_teacher(test_models / "smollm2", print)


@pytest.fixture(scope="session")
def smollm2_student(smollm2: Path, test_models: Path) -> Path:
    """Folder of the 3-bit copy of SmolLM2, in float32: the demo's student."""
    from opd_daemon.demo.smollm2 import make_student

    return make_student(smollm2, test_models / "smollm2-3bit", print)
