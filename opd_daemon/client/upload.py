"""Files of prompts, sent to a daemon that shares no disk with this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from opd_daemon.client.connection import Connection
from opd_daemon.errors import OpdError, Reason
from opd_daemon.paths import open_plain
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.v1 import run_pb2_grpc as rpc

PIECE_BYTES = 1 << 20
TIMEOUT = 600.0


def send_prompts(connection: Connection, file: Path) -> str:
    """Send a file in pieces; its path on the daemon's machine.

    Raises:
        OpdError: INVALID_REQUEST when the file can't be read; what the daemon says of it.
    """
    try:
        with open_plain(file) as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as fault:
        raise _unreadable(file, fault) from None
    answer: pb.UploadPromptsResponse = connection.unary(
        rpc.RunServiceStub, "UploadPrompts", _pieces(file, digest), timeout=TIMEOUT
    )
    return answer.path


def _pieces(file: Path, digest: str) -> Iterator[pb.UploadPromptsRequest]:
    """The digest comes with every piece, which costs nothing; the daemon compares it once."""
    with open_plain(file) as content:
        while piece := content.read(PIECE_BYTES):
            yield pb.UploadPromptsRequest(data=piece, sha256=digest)


def _unreadable(file: Path, fault: OSError) -> OpdError:
    return OpdError(Reason.INVALID_REQUEST, f"{file}: can't be read ({fault.strerror}); name a JSONL file", path=file)
