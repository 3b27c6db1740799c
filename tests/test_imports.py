"""Libraries that are imported late: whoever needs them first, and however many at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from opd_daemon.distill.data import load_tokenizer
from opd_daemon.teacher.tokenizer import TextTokenizer

together = Barrier(4)

def load(number):
    together.wait()
    TextTokenizer(Path(sys.argv[1]), "x") if number % 2 else load_tokenizer(Path(sys.argv[1]))

with ThreadPoolExecutor(4) as threads:
    list(threads.map(load, range(4)))
"""


def test_threads_that_need_a_tokenizer_first_all_get_one(tiny_teacher: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tiny_teacher)], check=True, timeout=120)
