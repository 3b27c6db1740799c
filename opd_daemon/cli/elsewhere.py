"""A daemon on another machine: prompts are sent there, the adapter is fetched. Models lie there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opd_daemon.cli import exits, output

if TYPE_CHECKING:
    from opd_daemon.client import Client
    from opd_daemon.config import RunConfig

PROMPTS = ("prompts_path", "validation_prompts_path")


def as_it_is_there(client: Client, config: RunConfig) -> RunConfig:
    """The configuration with paths of the daemon's machine; prompts are sent there. Unchanged for a daemon here."""
    if not client.connection.endpoint.remote:
        return config
    sent = {name: client.upload_prompts(Path(path)) for name in PROMPTS if (path := getattr(config, name))}
    return config.model_copy(update={**sent, "output_adapter_path": ""})


def fetch_adapter(client: Client, config: RunConfig, run_id: str, code: int) -> int:
    """After a run on another machine, put its adapter where the configuration wants it; the exit code as it was."""
    if code != exits.OK or not config.output_adapter_path or not client.connection.endpoint.remote:
        return code
    run, _ = client.run(run_id)
    early = run.step < run.total_steps
    folder = Path(config.output_adapter_path)
    client.download_adapter(run_id, folder, "best" if config.save_best_only or early else "final")
    output.say(f"fetched: {folder}")
    return code
