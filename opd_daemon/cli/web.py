"""`opd web`."""

from __future__ import annotations

import typer

from opd_daemon.cli import exits, output


def web(
    open_browser: bool = typer.Option(False, "--open", help="Open the link in the browser instead of printing it."),
) -> int:
    """Print a link to the daemon's page. It works once, within a minute, in one browser."""
    from opd_daemon.client import find_endpoint
    from opd_daemon.client.web import login_link
    from opd_daemon.home import Home

    link = login_link(find_endpoint(Home.default()))
    if open_browser:
        import webbrowser

        if webbrowser.open(link):
            return exits.OK
        output.say("opd: no browser could be started; open the link yourself")
    output.show(link)
    return exits.OK
