"""Fixtures of the science's tests."""

from __future__ import annotations

import pytest

from opd_daemon.distill import divergences, exact, logits, objective, outcomes


@pytest.fixture(params=["host", "device"])
def either_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations: in numpy, and in MLX as on a GPU."""
    for module in (divergences, exact, logits, objective, outcomes):
        monkeypatch.setattr(module, "on_host", lambda: request.param == "host")
    return str(request.param)
