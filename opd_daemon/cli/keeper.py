"""launchd and systemd, as far as one service of one user needs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opd_daemon.cli.unit import LABEL, Unit, launchd_plist, systemd_unit
from opd_daemon.errors import OpdError, Reason

SECONDS = 120.0
ALTERNATIVE = "'opd service install --print' shows the file; or keep 'opd serve' running in another way"


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What the service manager says; pid is 0 and last_exit None where it knows of none."""

    installed: bool
    running: bool
    pid: int
    last_exit: int | None
    file: str


class Keeper(Protocol):
    """Whoever starts a user's services at login and again after a failure."""

    file: Path

    def render(self, unit: Unit) -> bytes:
        """Content of the service's file."""
        ...

    def start(self) -> None:
        """Take the file up, in place of an earlier one, and start the service. Raises OpdError."""
        ...

    def stop(self) -> None:
        """Stop the service and forget it. Raises OpdError."""
        ...

    def status(self) -> ServiceStatus:
        """How the service does. Raises OpdError where the manager can't be asked."""
        ...


class Launchd:
    """The agents of the user who is logged in at the screen."""

    def __init__(self) -> None:
        self.file = Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"

    def render(self, unit: Unit) -> bytes:
        """A property list."""
        return launchd_plist(unit)

    def start(self) -> None:
        """Bootstrap the agent."""
        if self._print():
            _done("launchctl", "bootout", self._target)
        _done("launchctl", "bootstrap", self._domain, str(self.file))

    def stop(self) -> None:
        """Boot the agent out."""
        if self._print():
            _done("launchctl", "bootout", self._target)

    def status(self) -> ServiceStatus:
        """From `launchctl print`."""
        text = self._print()
        pid = re.search(r"^\s*pid = (\d+)", text, re.MULTILINE)
        code = re.search(r"^\s*last exit code = (-?\d+)", text, re.MULTILINE)
        number = int(pid[1]) if pid else 0
        return ServiceStatus(self.file.exists(), bool(number), number, int(code[1]) if code else None, str(self.file))

    def _print(self) -> str:
        """What launchd knows of the agent; empty when it doesn't know it."""
        answer = _asked("launchctl", "print", self._target)
        return answer.stdout if answer.returncode == 0 else ""


class Systemd:
    """The user's own systemd."""

    def __init__(self) -> None:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self._name = f"{LABEL}.service"
        self.file = config / "systemd" / "user" / self._name

    def render(self, unit: Unit) -> bytes:
        """A unit file."""
        return systemd_unit(unit)

    def start(self) -> None:
        """Enable the unit and start it anew."""
        self._do("daemon-reload")
        self._do("enable", self._name)
        self._do("restart", self._name)

    def stop(self) -> None:
        """Stop and disable the unit."""
        if self.file.exists():
            self._do("disable", "--now", self._name)

    def status(self) -> ServiceStatus:
        """From `systemctl show`."""
        answer = self._do("show", self._name, "--property=ActiveState,MainPID,ExecMainStatus,ExecMainExitTimestamp")
        facts = dict(line.partition("=")[::2] for line in answer.splitlines())
        pid = int(facts.get("MainPID") or 0)
        ended = facts.get("ExecMainExitTimestamp") not in {None, "", "n/a"}
        last = int(facts.get("ExecMainStatus") or 0) if ended else None
        return ServiceStatus(self.file.exists(), facts.get("ActiveState") == "active", pid, last, str(self.file))

    def _do(self, *arguments: str) -> str:
        return _done("systemctl", "--user", *arguments)


def keeper() -> Keeper:
    """This system's service manager.

    Raises:
        OpdError: NOT_IMPLEMENTED on a system that has neither.
    """
    if sys.platform == "darwin":
        return Launchd()
    if sys.platform == "linux":
        return Systemd()
    message = f"services are known on macOS (launchd) and Linux (systemd), not on {sys.platform}; use 'opd serve'"
    raise OpdError(Reason.NOT_IMPLEMENTED, message, platform=sys.platform)


def _done(*command: str) -> str:
    answer = _asked(*command)
    if answer.returncode != 0:
        said = " ".join((answer.stderr or answer.stdout).split()) or f"exit code {answer.returncode}"
        message = f"'{' '.join(command)}' failed: {said:.300}; {ALTERNATIVE}"
        raise OpdError(Reason.NOT_IMPLEMENTED, message, command=command[0])
    return answer.stdout


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        message = f"{command[0]} is not on this machine; {ALTERNATIVE}"
        raise OpdError(Reason.NOT_IMPLEMENTED, message, command=command[0]) from None
    except subprocess.TimeoutExpired:
        message = f"'{' '.join(command)}' didn't end within {SECONDS:.0f} s; {ALTERNATIVE}"
        raise OpdError(Reason.NOT_IMPLEMENTED, message, command=command[0]) from None
