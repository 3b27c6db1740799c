"""An adapter's files, streamed from the daemon to a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Literal

from opd_daemon.client.connection import Connection
from opd_daemon.errors import OpdError, Reason
from opd_daemon.names import is_identifier
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc

Choice = Literal["", "best", "final"]

_CHOICES: dict[Choice, pb.AdapterChoice.ValueType] = {
    "": pb.ADAPTER_CHOICE_UNSPECIFIED,
    "best": pb.ADAPTER_CHOICE_BEST,
    "final": pb.ADAPTER_CHOICE_FINAL,
}


def save_adapter(connection: Connection, run_id: str, folder: Path, choice: Choice) -> list[Path]:
    """Write each file under a temporary name and rename it when it is complete."""
    request = pb.DownloadAdapterRequest(run_id=run_id, choice=_CHOICES[choice])
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    part = folder / ".adapter.part"
    for piece in connection.stream(rpc.RunServiceStub, "DownloadAdapter", request):
        target = _target(folder, piece.file_name)
        with part.open("ab" if piece.offset else "wb") as file:
            _append(file, piece)
        if piece.offset + len(piece.data) == piece.file_bytes:
            part.replace(target)
            written.append(target)
    return written


def _target(folder: Path, name: str) -> Path:
    if not is_identifier(name):
        raise OpdError(Reason.INTERNAL, f"the daemon named a file {name!r}, which is no plain file name")
    return folder / name


def _append(file: IO[bytes], piece: pb.DownloadAdapterResponse) -> None:
    if file.tell() != piece.offset:
        raise OpdError(Reason.INTERNAL, f"{piece.file_name}: a piece at offset {piece.offset} came out of place")
    file.write(piece.data)
    file.flush()
    os.fsync(file.fileno())
