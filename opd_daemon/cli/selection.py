"""Which run a person means: its name, the beginning of it, or `last`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.client import Client
    from opd_daemon.types import Run

RUN_HELP = "Run: its name, the beginning of it (with or without 'distill_'), or 'last'."
NAMED_WHEN_AMBIGUOUS = 3


def find_run(client: Client, text: str) -> Run:
    """The one run that `text` names.

    Raises:
        OpdError: RUN_NOT_FOUND, also when several runs begin so.
    """
    matches: list[Run] = []
    for run in client.runs():
        if text in {run.run_id, "last"}:
            return run
        if run.run_id.startswith((text, f"distill_{text}")):
            matches.append(run)
    if not matches:
        cure = "'opd runs' lists them" if text != "last" else "start one with 'opd distill CONFIG.yaml'"
        raise OpdError(Reason.RUN_NOT_FOUND, f"RUN {text!r}: no such run; {cure}", run_id=text)
    if len(matches) > 1:
        names = ", ".join(run.run_id for run in matches[:NAMED_WHEN_AMBIGUOUS])
        more = ", …" if len(matches) > NAMED_WHEN_AMBIGUOUS else ""
        message = f"RUN {text!r}: {len(matches)} runs begin so ({names}{more}); give more of the name"
        raise OpdError(Reason.RUN_NOT_FOUND, message, run_id=text)
    return matches[0]
