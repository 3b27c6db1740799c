"""`opd compare`: what a run's models answer, side by side, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.cli.selection import RUN_HELP, find_run
from opd_daemon.errors import OpdError, Reason
from opd_daemon.names import COMPARED_MODELS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from opd_daemon.client import Client
    from opd_daemon.types import ModelAnswer, ModelSummary, Run

DEFAULT_PROMPTS = 3
MOST_PROMPTS_OF_A_FILE = 100
NARROWEST_COLUMN = 26
ORDER = (*COMPARED_MODELS, "speculative")


def compare(
    run: str = typer.Argument("last", metavar="[RUN]", help=RUN_HELP, show_default=False),
    *,
    prompt: list[str] = typer.Option(
        [],
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What to say; may be repeated.  [default: held-out prompts]",
    ),
    prompts: Path | None = typer.Option(None, metavar="FILE", help="JSONL file with prompts, as a run takes them."),
    max_tokens: int = typer.Option(0, min=0, help="Longest answer, in tokens; 0 is the run's max_generation_tokens."),
    models: str = typer.Option("", metavar="A,B", help=f"Of {', '.join(COMPARED_MODELS)}.  [default: all the run has]"),
    temperature: float = typer.Option(0.0, min=0.0, help="Sampling temperature; 0 is greedy."),
    speculative: bool = typer.Option(
        False, "--speculative", help="The teacher also answers with the distilled student as its draft model."
    ),
    as_json: bool = typer.Option(False, "--json", help="As JSON, once all is said."),
) -> int:
    """Let a run's models answer the same prompts: the answers side by side, then speed, memory and KL of each.

    Every model answers one prompt at a time. Ctrl-C ends it.
    """
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run)
        from opd_daemon.types import ComparisonRequest

        request = ComparisonRequest(
            run_id=found.run_id,
            prompts=tuple(prompt) + tuple(_read(prompts, MOST_PROMPTS_OF_A_FILE) if prompts else ())
            or tuple(_held_out(found)),
            max_tokens=max_tokens,
            models=tuple(name.strip() for name in models.split(",") if name.strip()),
            temperature=temperature,
            speculative=speculative,
        )
        _teacher_at_hand(client, found)
        said = Said(request.prompts)
        with _view(said, quiet=as_json) as view:
            for answer in client.compare(request):
                said.take(answer)
                view.show(answer)
    if as_json:
        output.show_json(said.document(found.run_id))
        return exits.OK
    _show_answers(said)
    _show_measurements(said)
    return exits.OK


@dataclass
class Said:
    """What was said so far. texts, tokens, ends: by model and prompt."""

    prompts: Sequence[str]
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], str] = field(default_factory=dict)
    summaries: dict[str, ModelSummary] = field(default_factory=dict)

    def take(self, answer: ModelAnswer) -> None:
        """Add a piece."""
        if answer.summary is not None:
            self.summaries[answer.model] = answer.summary
            return
        place = (answer.model, answer.prompt_index)
        self.texts[place] = self.texts.get(place, "") + answer.text
        self.tokens[place] = self.tokens.get(place, 0) + answer.tokens
        if answer.finish_reason:
            self.ends[place] = answer.finish_reason

    @property
    def models(self) -> list[str]:
        """Models that have said something, students first."""
        return [name for name in ORDER if any(model == name for model, _ in self.texts)]

    def document(self, run_id: str) -> dict[str, Any]:
        """All of it as plain data."""
        answers = [
            {"model": model, "prompt_index": index, "text": said, "tokens": self.tokens[model, index]}
            | {"finish_reason": self.ends.get((model, index), "")}
            for (model, index), said in self.texts.items()
        ]
        summaries = {
            name: {**output.plain(summary), "tokens_per_second": summary.tokens_per_second}
            for name, summary in self.summaries.items()
        }
        return {"run_id": run_id, "prompts": list(self.prompts), "answers": answers, "models": summaries}


def _read(path: Path, limit: int) -> list[str]:
    from opd_daemon.distill.data import read_rows

    return [row.prompt for row in read_rows(path, limit)]


def _held_out(run: Run) -> list[str]:
    from opd_daemon.config import parse_config
    from opd_daemon.distill.data import split_rows

    try:
        _, held_out = split_rows(parse_config(run.config))
    except OpdError as fault:
        message = f"the run's held-out prompts can't be read here ({fault.message}); give --prompt or --prompts"
        raise OpdError(Reason.INVALID_REQUEST, message) from None
    return [row.prompt for row in held_out[:DEFAULT_PROMPTS]]


def _teacher_at_hand(client: Client, run: Run) -> None:
    """Load the run's teacher if there is none; another one is left alone, and the daemon says so."""
    from opd_daemon.cli.teacher import load_with_progress

    if client.teacher()[1] is None:
        load_with_progress(client, run.config["teacher_model_path"])


# While they answer


class _Quiet:
    def show(self, answer: ModelAnswer) -> None:
        """Nothing."""


class _Lines(_Quiet):
    """A line on stderr as each model begins and ends."""

    def __init__(self) -> None:
        self._model = ""

    def show(self, answer: ModelAnswer) -> None:
        if answer.model != self._model:
            self._model = answer.model
            output.say(f"{answer.model} answers …")
        if answer.summary:
            output.say(f"{answer.model}: {answer.summary.tokens} tokens, {answer.summary.tokens_per_second:.1f} tok/s")


class _Screen(_Quiet):
    """The answers as they grow, in columns, never higher than the terminal."""

    def __init__(self, said: Said, live: Live) -> None:
        self._said = said
        self._live = live

    def show(self, answer: ModelAnswer) -> None:
        size = self._live.console.size
        self._live.update(picture(self._said, answer.model, size.width, size.height))


@contextmanager
def _view(said: Said, *, quiet: bool) -> Iterator[_Quiet]:
    if quiet:
        yield _Quiet()
    elif not output.is_terminal():
        yield _Lines()
    else:
        from rich.live import Live

        with Live(console=output.console(), refresh_per_second=8, transient=True) as live:
            yield _Screen(said, live)


def picture(said: Said, speaking: str, width: int, height: int) -> RenderableType:
    """The ends of the answers that fit, for people who watch them grow."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    models = said.models
    if width < NARROWEST_COLUMN * len(models):
        models = [name for name in models if name == speaking]
    table = Table(box=box.ROUNDED, expand=True, show_lines=True, header_style="bold")
    for name in models:
        table.add_column(Text(f"{name} …" if name == speaking else name, style="cyan" if name == speaking else "bold"))
    columns = max(8, width // max(1, len(models)) - 4)
    shown = [index for index in range(len(said.prompts)) if any((name, index) in said.texts for name in models)]
    rows = max(1, (height - 5) // max(1, len(shown)) - 1)
    for index in shown:
        table.add_row(*(_end_of(said.texts.get((name, index), ""), columns, rows) for name in models))
    return table


def _end_of(said: str, width: int, rows: int) -> str:
    import textwrap

    lines = [part for line in said.splitlines() for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(lines[-rows:])


# When all is said


def _show_answers(said: Said) -> None:
    screen = output.console()
    wide = screen.is_terminal and screen.width >= NARROWEST_COLUMN * len(said.models)
    for index, prompt in enumerate(said.prompts):
        if wide:
            _show_columns(said, index, prompt)
        else:
            _show_blocks(said, index, prompt)


def _show_columns(said: Said, index: int, prompt: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, expand=True, title=Text(prompt, style="bold"), title_justify="left")
    for name in said.models:
        table.add_column(name, ratio=1, overflow="fold", header_style="cyan")
    table.add_row(*(Text(_ended(said, name, index)) for name in said.models))
    output.console().print(table)


def _show_blocks(said: Said, index: int, prompt: str) -> None:
    output.show(f"PROMPT {index + 1}: {prompt}")
    for name in said.models:
        output.show(f"\n[{name}]\n{_ended(said, name, index)}")
    output.show()


def _ended(said: Said, name: str, index: int) -> str:
    cut = " …" if said.ends.get((name, index)) == "length" else ""
    return said.texts.get((name, index), "").strip() + cut


def _show_measurements(said: Said) -> None:
    order = [name for name in ORDER if name in said.summaries]
    columns = ["MODEL", "TOK/S", "SPEED-UP", "WEIGHTS", "ADAPTER", "PEAK", "FORWARD KL", "REVERSE KL", "AGREEMENT"]
    columns.append("ACCEPTANCE")
    output.show_table(columns, _rows(said, order), numbers=columns[1:])
    drafted = said.summaries.get("speculative")
    if drafted and drafted.accepted_fraction is not None:
        kept = text.percent(drafted.accepted_fraction)
        output.say(f"speculative: the teacher with the distilled student as its draft model; {kept} of the drafts kept")


def _rows(said: Said, order: Iterable[str]) -> Iterator[tuple[str, ...]]:
    for name in order:
        summary = said.summaries[name]
        accepted = summary.acceptance if summary.accepted_fraction is None else summary.accepted_fraction
        yield (
            name,
            f"{summary.tokens_per_second:.1f}",
            "" if summary.speedup is None else f"{summary.speedup:.2f} ×",
            text.size(summary.weight_bytes),
            text.size(summary.adapter_bytes) if summary.adapter_bytes else "",
            text.size(summary.peak_bytes),
            _nats(summary.forward_kl),
            _nats(summary.reverse_kl),
            "" if summary.agreement is None else text.percent(summary.agreement),
            "" if accepted is None else text.percent(accepted),
        )


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
