"""What `opd serve` must not import before it serves; bench/startup.py measures what is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Not pydantic: typer itself imports it.
HEAVY = frozenset(
    {
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "mlx",
        "mlx_lm",
        "numpy",
        "prometheus_client",
        "safetensors",
        "scipy",
        "starlette",
        "tokenizers",
        "transformers",
        "uvicorn",
    }
)


def test_a_daemon_serves_before_it_imports_what_models_runs_reports_and_pages_need(tmp_path: Path) -> None:
    # Python tells of every import on standard error, those of threads too.
    command = [sys.executable, "-X", "importtime", "-m", "opd_daemon.cli", "serve", "--home", str(tmp_path / "home")]
    served = subprocess.run(
        [*command, "--until-stdin-closes"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        # Only plugins that are the project's own: what others import is theirs to answer for.
        env={**os.environ, "OPD_PLUGINS": "trainers"},
    )
    assert " serves " in served.stdout
    rows = [line for line in served.stderr.splitlines() if line.startswith("import time:")]
    modules = {row.rpartition("|")[2].strip() for row in rows}
    assert {"opd_daemon.rpc.server", "opd_daemon.plugins.discovery", "opd_trainers.options"} <= modules
    assert not {module.partition(".")[0] for module in modules} & HEAVY
