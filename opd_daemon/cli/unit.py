"""The files that tell launchd and systemd how to keep a daemon running."""

from __future__ import annotations

import os
import plistlib
from dataclasses import dataclass
from pathlib import Path

from opd_daemon.logs import SERVICE_FILE

LABEL = "opd-daemon"
RESTART_SECONDS = 10
# On top of the time workers have: watches end, the teacher is unloaded, the store is closed.
CLOSING_SECONDS = 30
# macOS gives a process 256, and every client and file takes one.
OPEN_FILES = 8192
# What the daemon reads from its environment and a service manager wouldn't pass on.
PASSED_ON = ("OPD_PLUGINS", "OPENBLAS_CORETYPE", "HF_HOME")


@dataclass(frozen=True, slots=True)
class Unit:
    """One daemon to keep running. stop_grace: seconds its workers have for a checkpoint at the end."""

    command: tuple[str, ...]
    home: Path
    stop_grace: float

    @property
    def log(self) -> Path:
        """Where standard output and standard error go."""
        return self.home / "logs" / SERVICE_FILE

    @property
    def stop_seconds(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return round(self.stop_grace) + CLOSING_SECONDS

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the present environment that matter to the daemon."""
        return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def launchd_plist(unit: Unit) -> bytes:
    """A property list for `~/Library/LaunchAgents`."""
    values = {
        "Label": LABEL,
        "ProgramArguments": list(unit.command),
        "EnvironmentVariables": unit.environment,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": RESTART_SECONDS,
        # launchd's own patience is 20 seconds, less than a checkpoint of a large student may take.
        "ExitTimeOut": unit.stop_seconds,
        # Any other type is slowed down whenever an application is in front.
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "StandardOutPath": str(unit.log),
        "StandardErrorPath": str(unit.log),
    }
    return plistlib.dumps(values, sort_keys=False)


def systemd_unit(unit: Unit) -> bytes:
    """A unit file for `~/.config/systemd/user`."""
    log = _specifiers(str(unit.log))
    lines = [
        "[Unit]",
        "Description=On-policy distillation daemon (opd)",
        "StartLimitIntervalSec=600",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(map(_argument, unit.command))}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in unit.environment.items()),
        "Restart=on-failure",
        f"RestartSec={RESTART_SECONDS}",
        "# The daemon stops its workers itself; what is left after that is killed.",
        "KillMode=mixed",
        f"TimeoutStopSec={unit.stop_seconds}",
        f"LimitNOFILE={OPEN_FILES}",
        f"StandardOutput=append:{log}",
        f"StandardError=append:{log}",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines).encode()


def _argument(text: str) -> str:
    # In commands, and only there, systemd also puts variables in.
    return _quoted(text.replace("$", "$$"))


def _quoted(text: str) -> str:
    escaped = _specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")
