"""What `opd serve` must not load before it serves; bench/startup.py measures what is left."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("matplotlib", "scipy", "mlx_lm", "transformers", "jinja2", "prometheus_client", "starlette", "uvicorn")
SERVED = (
    "import sys, opd_daemon.cli.main, opd_daemon.rpc.server\n"
    "from opd_daemon.plugins import PluginRegistry\n"
    "PluginRegistry.discover()\n"
    "print(*sys.modules)"
)


def test_a_daemon_serves_before_it_loads_what_models_reports_and_pages_need() -> None:
    said = subprocess.run([sys.executable, "-c", SERVED], check=True, capture_output=True, text=True, timeout=120)
    modules = set(said.stdout.split())
    assert "opd_daemon.rpc.server" in modules
    assert not modules & set(HEAVY)
