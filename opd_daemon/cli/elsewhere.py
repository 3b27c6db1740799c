"""A daemon on another machine: prompts are sent there, the adapter is fetched. Models lie there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_daemon.cli import output

if TYPE_CHECKING:
    from opd_daemon.client import Client
    from opd_daemon.config import RunConfig

PROMPTS = ("prompts_path", "validation_prompts_path")


def as_it_is_there(client: Client, config: RunConfig) -> RunConfig:
    """The configuration with paths of the daemon's machine; prompts are sent there. Unchanged for a daemon here."""
    return all_as_they_are_there(client, [config])[0]


def all_as_they_are_there(client: Client, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The same for several, whose files are sent once each."""
    if not client.connection.endpoint.remote:
        return list(configs)
    named = [{name: path for name in PROMPTS if (path := getattr(config, name))} for config in configs]
    sent = {
        path: client.upload_prompts(Path(path)) for path in dict.fromkeys(path for n in named for path in n.values())
    }
    return [
        config.model_copy(update={"output_adapter_path": "", **{name: sent[path] for name, path in names.items()}})
        for config, names in zip(configs, named, strict=True)
    ]


def fetch_adapter(client: Client, config: RunConfig, run_id: str) -> None:
    """After a run that succeeded on another machine, put its adapter where the configuration wants it."""
    if not config.output_adapter_path or not client.connection.endpoint.remote:
        return
    run, _ = client.run(run_id)
    early = run.step < run.total_steps
    folder = Path(config.output_adapter_path)
    client.download_adapter(run_id, folder, "best" if config.save_best_only or early else "final")
    output.say(f"fetched: {folder}")
