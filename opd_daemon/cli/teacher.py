"""`opd teacher`: what is in memory, load it, free it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import user_path

if TYPE_CHECKING:
    from rich.progress import Progress

    from opd_daemon.client import Client
    from opd_daemon.types import LoadProgress, TeacherInfo

app = typer.Typer(help="The teacher in memory: status, load, unload.", invoke_without_command=True)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@app.callback()
def teacher(context: typer.Context) -> None:
    """The teacher in memory: status, load, unload."""
    if context.invoked_subcommand is None:
        status(as_json=False)


@app.command("status")
def status(as_json: bool = typer.Option(False, "--json", help="As JSON.")) -> int:
    """Describe the teacher and what its cache holds."""
    from opd_daemon.client import Client

    with Client.find() as client:
        state, info, failure = client.teacher()
        cache = client.cache_stats()
    if as_json:
        output.show_json({"state": state, "failure": failure, "teacher": info, "cache": cache})
        return exits.OK
    output.show_facts([("state", str(state).lower()), ("failure", failure), *_facts(info)])
    return exits.OK


@app.command("load")
def load(
    path: str = typer.Argument(help="mlx-lm model folder, or the id of one on the Hugging Face hub."),
    force: bool = typer.Option(False, "--force", help="Replace the present teacher even while a run uses it."),
) -> int:
    """Load a teacher and keep it in memory."""
    from opd_daemon.client import Client

    with Client.find() as client:
        load_with_progress(client, model_argument(path), force=force)
        info = client.loaded_teacher()
    output.show_facts(_facts(info))
    return exits.OK


@app.command("unload")
def unload(force: bool = typer.Option(False, "--force", help="Even while a run uses it; that run fails.")) -> int:
    """Free the teacher's memory."""
    from opd_daemon.client import Client

    with Client.find() as client:
        client.unload_teacher(force=force)
    output.say("no teacher in memory")
    return exits.OK


def model_argument(given: str) -> str:
    """A model named on the command line: a path becomes absolute, a hub id that is no path stays as it is."""
    if not given:
        raise OpdError(Reason.INVALID_REQUEST, "the teacher's path is empty; name an mlx-lm model folder or a hub id")
    path = user_path(given)
    if not os.path.lexists(path) and HUB_ID.fullmatch(given) and not given.startswith("."):
        return given
    return str(path.absolute())


def load_with_progress(client: Client, path: str, *, force: bool = False) -> None:
    """Load a teacher, showing each phase on stderr."""
    with _meter() as meter:
        for progress in client.load_teacher(path, force=force):
            meter.show(progress)


class _Meter(Protocol):
    def show(self, progress: LoadProgress) -> None: ...


@contextmanager
def _meter() -> Iterator[_Meter]:
    screen = output.console(stderr=True)
    if not screen.is_terminal:
        yield _PhaseLines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        yield _PhaseBar(bars)


class _PhaseLines:
    """A line per phase."""

    def __init__(self) -> None:
        self._phase = ""

    def show(self, progress: LoadProgress) -> None:
        if progress.phase != self._phase:
            self._phase = progress.phase
            output.say(f"teacher: {progress.phase}{f' ({progress.message})' if progress.message else ''}")


class _PhaseBar:
    """A bar that starts anew with every phase."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("checking", total=1.0)
        self._phase = "checking"

    def show(self, progress: LoadProgress) -> None:
        if progress.phase != self._phase:
            self._phase = progress.phase
            self._bars.reset(self._task, description=progress.phase)
        self._bars.update(self._task, completed=progress.fraction)


def _facts(info: TeacherInfo | None) -> list[tuple[str, str]]:
    if info is None:
        return []
    bits = f", {info.quantization_bits}-bit" if info.quantization_bits else ""
    return [
        ("name", info.name),
        ("model", f"{info.architecture}, {info.dtype}{bits}, {text.size(info.weight_bytes)}"),
        ("vocabulary", f"{info.vocab_size} tokens, logits {info.padded_vocab_size} wide"),
        ("context", f"{info.max_context} tokens"),
        ("exact KL", "yes" if info.supports_hidden else f"no: {info.hidden_refusal}"),
        ("digest", info.digest[:16]),
    ]
