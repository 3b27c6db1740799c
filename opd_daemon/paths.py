"""Paths that a client names: inside folders the daemon's owner allows, and nothing but plain files and folders.

Links are followed before a path is judged, on both sides. A path is judged again whenever it is about to be used:
when a run is accepted, resumed and started, and when its models are compared. What is opened is judged once more, by
its descriptor (`open_plain`), since a name may mean something else by then.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal

from opd_daemon.errors import FieldViolation, Reason, violations_error
from opd_daemon.home import Home, user_path

Kind = Literal["file", "folder", "new"]

OUTSIDE = "outside the folders clients may name; move it into one, or start the daemon with --allow-root FOLDER"
LINKED_OUT = "a link in it leads outside the folders clients may name; copy what it points to"
SPECIAL = "a device, pipe or socket; name a plain file or folder"
CONTROL = "holds a control character; name another path"
# Where the owner's own environment keeps models.
CACHE_VARIABLES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")
MOST_ENTRIES = 10_000

# What the paths of a run's configuration have to be.
RUN_PATHS: Mapping[str, Kind] = {
    "base_model_path": "folder",
    "teacher_model_path": "folder",
    "student_adapter_path": "folder",
    "output_adapter_path": "new",
    "prompts_path": "file",
    "validation_prompts_path": "file",
}


@dataclass(frozen=True, slots=True)
class AllowedRoots:
    """Folders in which clients may name paths, without links."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, folders: Iterable[Path]) -> AllowedRoots:
        """Of folders that may be links, or not be there yet."""
        return cls(tuple(dict.fromkeys(Path(os.path.realpath(folder.expanduser())) for folder in folders)))

    @classmethod
    def default(cls, home: Home, more: Iterable[Path] = (), *, remote: bool = False) -> AllowedRoots:
        """The daemon's home and `more`; unless `remote`, also what its owner works with.

        Those are the owner's home, the working directory, folders for temporary files and model caches: whoever calls
        from this machine with the owner's token may read them anyway. remote: other machines can call.
        """
        own = () if remote else _of_the_owner()
        return cls.of([home.root, *more, *own])

    def fault(self, text: str, kind: Kind) -> str:
        """Why a client may not name this path, with the cure; empty when it may. A path may be missing.

        A folder's own files are judged too, as they are what is read.
        """
        if any(ord(character) < 32 or ord(character) == 127 for character in text):
            return CONTROL
        path = user_path(text).absolute()
        fault = self._fault_of(path)
        if fault or kind != "folder" or not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, never raises
            return fault
        return self._fault_inside(path)

    def require(self, field: str, text: str, kind: Kind) -> None:
        """Raise PATH_NOT_ALLOWED with the field at fault unless the path may be named."""
        if fault := self.fault(text, kind):
            raise violations_error([FieldViolation(field, f"{text!r}: {fault}")], Reason.PATH_NOT_ALLOWED)

    def faults_of_run(self, values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        """Names of a run configuration's paths that may not be named, and why."""
        for name, kind in RUN_PATHS.items():
            text = values.get(name)
            if isinstance(text, str) and text and (fault := self.fault(text, kind)):
                yield name, fault

    def _fault_of(self, path: Path) -> str:
        lexical = Path(os.path.normpath(path))
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError):
            return OUTSIDE
        if not self._holds(real):
            return LINKED_OUT if self._holds(lexical) and lexical != real else OUTSIDE
        try:
            mode = real.stat().st_mode
        except (OSError, ValueError):
            return ""  # missing or closed, which whoever needs it will tell
        return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else SPECIAL

    def _fault_inside(self, folder: Path) -> str:
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number == MOST_ENTRIES:
                        return f"holds more than {MOST_ENTRIES} entries, which no model does; name another folder"
                    if fault := self._fault_of(Path(entry.path)):
                        return f"{entry.name}: {fault}"
        except OSError:
            return ""
        return ""

    def _holds(self, path: Path) -> bool:
        """By name, or by what the names stand for: on some disks they differ in case, or a folder has two."""
        places = (path, *path.parents)
        if any(folder in places for folder in self.folders):
            return True
        roots = {identity for folder in self.folders if (identity := _identity(folder))}
        return any(_identity(place) in roots for place in places)


def open_plain(path: Path) -> BufferedReader:
    """Open a file for reading, if it is a plain one; never waits for a pipe's other end.

    Raises:
        OSError: as `open`; EINVAL for a device, pipe or socket.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if number == errno.EISDIR else f"it is {SPECIAL}", str(path))
    return os.fdopen(descriptor, "rb")


def _of_the_owner() -> Iterator[Path]:
    yield Path.home()
    # A service manager starts programs in the root folder, which would be everything.
    if Path.cwd() != Path(Path.cwd().anchor):
        yield Path.cwd()
    yield Path(tempfile.gettempdir())
    yield Path("/tmp")  # noqa: S108 - allowed, not used; macOS has another one besides
    yield from (Path(value) for name in CACHE_VARIABLES if (value := os.environ.get(name)))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
