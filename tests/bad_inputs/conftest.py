"""One daemon for all the tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_inputs.stage import Stage, raised
from tests.tiny import write_tiny_qwen2


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("bad_inputs")
    write_tiny_qwen2(folder / "shuffled", seed=3, shuffled_vocab=True)
    write_tiny_qwen2(folder / "superset", seed=4, extra_tokens=("<tool>", "</tool>"))
    write_tiny_qwen2(folder / "padded", seed=5, vocab=1024)
    (folder / "no_model").mkdir()
    with raised(folder) as built:
        yield built
