"""`opd report`."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from opd_daemon.cli import exits, output
from opd_daemon.cli.selection import RUN_HELP, find_run
from opd_daemon.errors import OpdError, Reason


def report(
    run: str = typer.Argument("last", metavar="[RUN]", help=RUN_HELP, show_default=False),
    *,
    file: Path | None = typer.Option(
        None, "--output", "-o", metavar="FILE", help="Where to write the page.  [default: RUN.html]", show_default=False
    ),
    pictures: Path | None = typer.Option(None, metavar="DIR", help="Write the charts as PNG files there too."),
    open_it: bool = typer.Option(False, "--open", help="Show the page in the browser."),
) -> int:
    """Write the report of a finished run: one HTML file with everything in it, readable anywhere.

    A run that was stopped or failed has one of what it did until then.
    """
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run)
        files = client.report(found.run_id)
        page = file or Path(f"{found.run_id}.html")
        _write(page, next(files).content)
        if pictures:
            for picture in files:
                _write(pictures / picture.name, picture.content)
    output.show(str(page))
    if open_it:
        typer.launch(page.absolute().as_uri())
    return exits.OK


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as fault:
        raise OpdError(Reason.INVALID_REQUEST, f"{path}: can't be written: {fault.strerror}", path=path) from None
