"""A run's report, streamed from the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from opd_daemon.client.connection import Connection
from opd_daemon.errors import OpdError, Reason
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc


@dataclass(frozen=True, slots=True)
class ReportFile:
    """The page, or one of its pictures. `name` has no folder."""

    name: str
    content: bytes


def read_report(connection: Connection, run_id: str) -> Iterator[ReportFile]:
    """The page, then the pictures; leaving the iteration ends the download."""
    content = bytearray()
    request = pb.DownloadReportRequest(run_id=run_id)
    for piece in connection.stream(rpc.RunServiceStub, "DownloadReport", request):
        if piece.offset != len(content) or piece.file_name != PurePath(piece.file_name).name:
            raise OpdError(Reason.INTERNAL, f"{piece.file_name!r}: a piece at offset {piece.offset} is out of place")
        content += piece.data
        if len(content) == piece.file_bytes:
            yield ReportFile(piece.file_name, bytes(content))
            content.clear()
