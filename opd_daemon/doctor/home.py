"""What is in the daemon's home, and whether a daemon lives there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_daemon import schema
from opd_daemon.doctor.finding import Finding, error, fine, warning
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.models.folder import FolderFault, read_folder
from opd_daemon.readable import size
from opd_daemon.store_check import check_store

FULL_BYTES = 1 << 30
NEARLY_FULL_BYTES = 10 << 30
ANYONE_ELSE = 0o077
OTHERS_MAY_WRITE = 0o022
FAULTS_SHOWN = 3


def disk(home: Home) -> Finding:
    """Room for checkpoints and the teacher's cache."""
    free = shutil.disk_usage(_existing(home.root)).free
    text = f"{size(free)} free for {home.root}"
    cure = "free some, 'opd cache prune --keep 1GB', or choose another home with $OPD_HOME"
    if free < FULL_BYTES:
        return error("disk", text, cure)
    return warning("disk", text, cure) if free < NEARLY_FULL_BYTES else fine("disk", text)


def folder(home: Home) -> Finding:
    """Whether the home can be written to by its owner, and by nobody else."""
    place = _existing(home.root)
    if not os.access(place, os.W_OK | os.X_OK):
        return error("home", f"{place} can't be written to", f"chown it to yourself, or set OPD_HOME (now {home.root})")
    if not home.root.is_dir():
        return fine("home", f"{home.root} (not there yet; the daemon makes it)")
    if _mode(home.root) & OTHERS_MAY_WRITE:
        return error("home", f"{home.root} can be written to by others", f"chmod go-w {home.root}")
    if home.runtime.is_dir() and _mode(home.runtime) & ANYONE_ELSE:
        return error("home", f"{home.runtime} is open to others", f"chmod 700 {home.runtime}")
    if _mode(home.root) & ANYONE_ELSE:
        text = f"{home.root} can be read by others of this machine: prompts, completions and adapters lie in it"
        return warning("home", text, f"chmod 700 {home.root}")
    return fine("home", str(home.root))


def daemon(home: Home) -> Finding:
    """Whether a daemon answers, and whether its token is a secret."""
    try:
        mode = _mode(home.discovery)
        json.loads(home.discovery.read_bytes())
    except FileNotFoundError:
        return fine("daemon", "none is running")
    except (OSError, ValueError):
        return error("daemon", f"{home.discovery} can't be read", "delete it and start the daemon again")
    if mode & ANYONE_ELSE:
        cure = f"chmod 600 {home.discovery}, and restart the daemon: its token may be known"
        return error("daemon", f"{home.discovery} holds the token and has mode {mode:04o}", cure)
    return _answer(home)


def _answer(home: Home) -> Finding:
    from opd_daemon.client import Client, find_endpoint  # grpc, which no check before this needs

    try:
        endpoint = find_endpoint(home)
        with Client.find(home, endpoint.address, endpoint.token) as client:
            state, info, _ = client.teacher()
    except OpdError as fault:
        if fault.reason is Reason.DAEMON_NOT_RUNNING:
            return warning("daemon", "its discovery file is there, but no daemon answers", "start it with 'opd serve'")
        return error("daemon", fault.message, "restart the daemon, and see its log in $OPD_HOME/logs")
    teacher = info.name if info else f"teacher {state}"
    return fine("daemon", f"pid {endpoint.pid} answers at {endpoint.address} ({teacher})")


def left_behind(home: Home) -> Finding:
    """Socket and lock of a daemon that has died."""
    if not home.lock.exists():
        return fine("lock", "free")
    with contextlib.suppress(OSError), home.lock.open("rb") as lock:
        pid = lock.read().decode(errors="replace").strip()
        if _is_held(lock):
            return fine("lock", f"held by pid {pid}")
        if home.socket.exists() or home.discovery.exists():
            text = f"a daemon (pid {pid}) has died and left its socket behind"
            return warning("lock", text, "nothing to do: the next 'opd serve' takes it away")
        return fine("lock", "free")
    return error("lock", f"{home.lock} can't be read", f"chown it to yourself: {home.lock}")


def _is_held(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def store(home: Home) -> Finding:
    """Whether the store is whole; reads only."""
    if not home.database.exists() or not home.database.stat().st_size:
        return fine("store", "none yet")
    try:
        report = check_store(home.database)
    except OpdError as fault:
        text, _, cure = str(fault).rpartition("; ")
        return error("store", text, cure)
    if report.schema > schema.VERSION:
        return error("store", f"written by a newer opd (schema {report.schema})", "upgrade opd")
    if report.faults:
        text = f"{home.database} is damaged: {'; '.join(report.faults[:FAULTS_SHOWN])}"
        return error("store", text, "'opd store check' tells more; put a backup in its place")
    return fine("store", f"whole, {report.runs} runs, {size(report.bytes)}")


def models(home: Home) -> Iterator[Finding]:
    """The model folders in the home."""
    names = []
    for place in sorted(home.models.iterdir()) if home.models.is_dir() else []:
        try:
            names.append(read_folder(place).name)
        except FolderFault as fault:
            yield warning("models", f"{fault.place}: {fault.problem.partition(';')[0]}", _cure(fault))
    text = ", ".join(names) or f"none in {home.models}; runs and teachers may name folders anywhere"
    yield fine("models", text)


def _cure(fault: FolderFault) -> str:
    return fault.problem.partition(";")[2].strip() or "copy the folder again, or remove it"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
