"""`opd demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, output

if TYPE_CHECKING:
    from opd_daemon.client import Client
    from opd_daemon.demo.result import DemoResult
    from opd_daemon.home import Home
    from opd_daemon.types import Run


def demo(
    *,
    trainer: str = typer.Option("on_policy", help="on_policy or offline."),
    steps: int = typer.Option(0, min=0, help="Optimizer updates; 0: as many as take a few minutes on two CPU cores."),
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write the numbers to this file too."),
    keep: bool = typer.Option(
        False, "--keep", help="Leave the daemon running until Ctrl-C, to try other commands on it."
    ),
) -> int:
    """Distil a real 135M model on this machine in minutes: convert, damage, train, compare.

    Models, cache and results stay in $OPD_HOME/demo, so a second demo starts warm. Ctrl-C stops everything.
    """
    from dataclasses import replace

    from opd_daemon.demo import story
    from opd_daemon.demo.result import Seconds
    from opd_daemon.home import Home

    settings = story.DemoSettings(Home.default().root / "demo", trainer, steps)
    settings.run_values(Path(), Path())  # refuses a wrong --trainer before anything is prepared
    Home.default().make()
    seconds, stage = Seconds(), TerminalStage()
    models = story.prepare_models(settings, seconds, stage)
    with story.demo_daemon(settings, seconds, stage) as client:
        try:
            result = story.tell(settings, client, models, seconds, stage)
            seconds.phases["total"] = seconds.total
            _show(replace(result, curve_path=_curve(result, settings.folder / "learning_curve.png")), json_file)
            if keep:
                _wait(settings.home)
        except KeyboardInterrupt:
            output.say("\nstopping the daemon; what the teacher computed stays in its cache for the next time")
            raise
    return exits.OK


def _show(result: DemoResult, json_file: Path | None) -> None:
    from opd_daemon.demo.table import show_result

    if json_file:
        result.write_json(json_file)
    show_result(result, output.console())


class TerminalStage:
    """Tells the story on the terminal, or in lines."""

    def say(self, text: str) -> None:
        """One line."""
        output.say(f"• {text}")

    def load_teacher(self, client: Client, path: str) -> None:
        """Load a teacher, showing its progress."""
        from opd_daemon.cli.teacher import load_with_progress

        load_with_progress(client, path)

    def follow(self, client: Client, run: Run) -> None:
        """Show a run until it rests."""
        from opd_daemon.cli.follow import follow

        follow(client, run, on_interrupt="detach")


def _curve(result: DemoResult, file: Path) -> str:
    """Draw the learning curve; the path of the picture."""
    from opd_daemon.demo.curve import draw_curve

    return str(draw_curve(result, file))


def _wait(home: Home) -> None:
    """Wait until Ctrl-C raises."""
    import threading

    output.say(f"\nthe daemon stays until Ctrl-C; in another terminal: OPD_HOME={home.root} opd generate 'Hello'")
    threading.Event().wait()
