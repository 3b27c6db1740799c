"""Long forms: `OPD_SOAK=1` runs them, as `make soak` does."""

from __future__ import annotations

import os
import sys

import pytest

SOAK = bool(os.environ.get("OPD_SOAK"))
soak_only = pytest.mark.skipif(not SOAK, reason="takes minutes; set OPD_SOAK=1")


def show(figures: str) -> None:
    """Print what was measured; `pytest -s` shows it."""
    sys.stdout.write(f"\n{figures}\n")
