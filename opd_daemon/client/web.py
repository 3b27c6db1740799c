"""The way into the daemon's web port."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from opd_daemon.client.connection import Endpoint
from opd_daemon.errors import OpdError, Reason

SECONDS = 10.0


def login_link(endpoint: Endpoint) -> str:
    """A link that opens the daemon's page in one browser, once and soon.

    Raises:
        OpdError: INVALID_REQUEST when the daemon serves no pages, DAEMON_NOT_RUNNING when it doesn't answer.
    """
    if not endpoint.web_port:
        message = "the daemon serves no pages; stop it, and start it with 'opd serve --web-port 0'"
        raise OpdError(Reason.INVALID_REQUEST, message)
    # By number: whoever else listens on the machine's other loopback addresses is not meant.
    site = f"http://127.0.0.1:{endpoint.web_port}"
    headers = {"Authorization": f"Bearer {endpoint.token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{site}/login-code", b"{}", headers, method="POST")  # noqa: S310 - http
    # A proxy of the environment is for other machines, and must not see the token.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=SECONDS) as answer:
            code = json.load(answer)["code"]
    except (OSError, ValueError, KeyError) as fault:
        reason = f"HTTP {fault.code}" if isinstance(fault, urllib.error.HTTPError) else type(fault).__name__
        message = f"no code from {site} ({reason}); is the daemon still up? 'opd doctor' tells"
        raise OpdError(Reason.DAEMON_NOT_RUNNING, message) from None
    return f"{site}/login?code={code}"
