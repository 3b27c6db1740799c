"""What the tree itself must not hold: ways to run what a file brings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("opd_daemon", "plugins", "bench", "clients")
RUNS_WHAT_IT_READS = re.compile(
    r"^\s*(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|jsonpickle)\b"
    r"|\btorch\.load\(|allow_pickle\s*=\s*True|trust_remote_code[\"']?\s*[=:]\s*True"
    r"|\byaml\.(?:load_all|unsafe_load|full_load)\(|\byaml\.load\((?!.*Loader=_UniqueNames\))|read_pickle\("
    r"|(?<![\w.])(?:eval|exec)\(",
    re.MULTILINE,
)


def sources() -> list[Path]:
    return [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "    import dill",
        "x = torch.load(path)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        'load_tokenizer(path, {"trust_remote_code": True})',
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(code)",
    ],
)
def test_the_net_catches_what_it_should(line: str) -> None:
    assert RUNS_WHAT_IT_READS.search(line)


@pytest.mark.parametrize(
    "line", ["mx.eval(array)", "model.eval()", "yaml.safe_load(text)", '{"trust_remote_code": False}']
)
def test_the_net_lets_through_what_it_should(line: str) -> None:
    assert not RUNS_WHAT_IT_READS.search(line)


def test_nothing_runs_what_it_reads() -> None:
    assert len(sources()) > 150
    found = {
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for path in sources()
        for match in RUNS_WHAT_IT_READS.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_the_linter_refuses_pickle_too() -> None:
    """Ruff's S301 and its kin are on, and nobody has switched them off somewhere."""
    code = "import pickle\n\npickle.loads(b'')\n"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "-"]
    for place in ("opd_daemon/x.py", "plugins/x/x.py", "tests/x.py"):
        done = subprocess.run(
            [*command, "--stdin-filename", place], input=code, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert "S301" in done.stdout, (place, done.stdout, done.stderr)
