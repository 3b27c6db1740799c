"""The resident teacher as a trainer sees it, and the calls that score and generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from opd_daemon.client.connection import Connection
from opd_daemon.errors import RETRY_AFTER, OpdError, Reason
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import CachedScores, GeneratedToken, GenerateRequest, ScoreRequest, TeacherInfo
from opd_daemon.v1 import teacher_pb2 as pb
from opd_daemon.v1 import teacher_pb2_grpc as rpc
from opd_daemon.wire import arrays as wire

if TYPE_CHECKING:
    from opd_daemon.client.client import Client

T = TypeVar("T")

REQUEST_BYTES = 8 << 20
# What a sequence counts beside its ids: so no call has more of them than a daemon takes.
SEQUENCE_BYTES = 512
"""Most bytes of ids in one request; larger work is split into several calls."""

BUSY = frozenset({Reason.QUEUE_FULL, Reason.TEACHER_LOADING})
BUSY_PATIENCE = 600.0
# Without a word of the daemon's; and the longest before looking again whatever it says.
BUSY_DELAY, LONGEST_DELAY = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class GeneratedPiece:
    """New tokens of one prompt, as they arrive; `text` is what they complete."""

    prompt_index: int
    tokens: tuple[GeneratedToken, ...]
    text: str
    finish_reason: str
    cached: bool


@dataclass(frozen=True, slots=True)
class Expected:
    """Digests the teacher must have; empty ones are not checked."""

    teacher: str = ""
    tokenizer: str = ""


ANY_TEACHER = Expected()


class Streams(Protocol):
    """What the calls below need of a connection."""

    def stream(self, stub: type[Any], method: str, request: Any) -> Iterator[Any]:
        """The answers of one streaming call; leaving the iteration cancels it."""
        ...


@dataclass(frozen=True, slots=True)
class Interruptible:
    """A connection whose streams are left, freeing the teacher, once `should_stop` says so."""

    connection: Connection
    should_stop: Callable[[], bool]

    def stream(self, stub: type[Any], method: str, request: Any) -> Iterator[Any]:
        """The answers of one streaming call. Raises CANCELLED when it is to stop."""
        for answer in self.connection.stream(stub, method, request):
            if self.should_stop():
                raise OpdError(Reason.CANCELLED, "left the call to the teacher, as the run was asked to stop")
            yield answer


def score(
    connection: Streams, requests: Sequence[ScoreRequest], expected: Expected, *, use_cache: bool
) -> list[CachedScores]:
    """Score sequences, in as many calls as their sizes and differing wants need; results in the requests' order."""
    results: list[CachedScores | None] = [None] * len(requests)
    for indices in score_calls(requests):
        batch = [requests[index] for index in indices]
        for index, result in zip(indices, _score_call(connection, batch, expected, use_cache=use_cache), strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def score_calls(requests: Sequence[ScoreRequest], limit: int = REQUEST_BYTES) -> list[list[int]]:
    """Indices of the requests of each call: alike in wants and masked ids, together at most `limit` bytes of ids."""
    groups: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request.wants, request.masked_token_ids), []).append(index)
    calls: list[list[int]] = []
    for indices in groups.values():
        calls.extend(_split(indices, [_score_bytes(requests[index]) for index in indices], limit))
    return calls


def _split(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    calls: list[list[int]] = []
    room = 0
    for index, size in zip(indices, sizes, strict=True):
        if not calls or size > room:
            calls.append([])
            room = limit
        calls[-1].append(index)
        room -= size
    return calls


def _score_bytes(request: ScoreRequest) -> int:
    candidates = 0 if request.candidate_ids is None else request.candidate_ids.size
    return 4 * (len(request.token_ids) + candidates) + SEQUENCE_BYTES


def _score_call(
    connection: Streams, requests: list[ScoreRequest], expected: Expected, *, use_cache: bool
) -> list[CachedScores]:
    message = pb.ComputeLogprobsRequest(
        sequences=[wire.sequence_to_proto(request) for request in requests],
        outputs=wire.outputs_to_proto(requests[0].wants),
        masked_token_ids=requests[0].masked_token_ids,
        expected_teacher_digest=expected.teacher,
        expected_tokenizer_digest=expected.tokenizer,
        skip_cache=not use_cache,
    )
    assembler = wire.ScoreAssembler(requests)
    for response in connection.stream(rpc.TeacherServiceStub, "ComputeLogprobs", message):
        if response.HasField("block"):
            assembler.add(response.block)
    return assembler.results()


def stream_generation(
    connection: Streams, requests: Sequence[GenerateRequest], expected: Expected, *, use_cache: bool
) -> Iterator[GeneratedPiece]:
    """Continue prompts; pieces of different prompts alternate."""
    message = pb.GenerateRequest(
        prompts=[wire.prompt_to_proto(request) for request in requests],
        expected_teacher_digest=expected.teacher,
        expected_tokenizer_digest=expected.tokenizer,
        skip_cache=not use_cache,
    )
    for response in connection.stream(rpc.TeacherServiceStub, "Generate", message):
        if response.HasField("block"):
            block = response.block
            tokens = tuple(wire.tokens_from_block(block))
            reason = tokens[-1].finish_reason if tokens else ""
            yield GeneratedPiece(block.prompt_index, tokens, block.text, reason, block.cached)


def generate(
    connection: Streams, requests: Sequence[GenerateRequest], expected: Expected, *, use_cache: bool
) -> list[list[GeneratedToken]]:
    """Continue prompts; one completion per request, in order. Large batches are split into several calls."""
    completions: list[list[GeneratedToken]] = [[] for _ in requests]
    sizes = [4 * len(request.prompt_ids) + SEQUENCE_BYTES for request in requests]
    for indices in _split(list(range(len(requests))), sizes, REQUEST_BYTES):
        batch = [requests[index] for index in indices]
        for piece in stream_generation(connection, batch, expected, use_cache=use_cache):
            completions[indices[piece.prompt_index]].extend(piece.tokens)
    return completions


def fetch_head(connection: Streams, expected: Expected) -> TeacherHead:
    """The teacher's output head."""
    request = pb.GetHeadRequest(expected_teacher_digest=expected.teacher)
    responses = connection.stream(rpc.TeacherServiceStub, "GetHead", request)
    facts = next(responses).facts
    return wire.head_from_pieces(facts, (response.piece for response in responses if response.HasField("piece")))


class RemoteTeacher:
    """`opd_daemon.trainer.Teacher` over the public API, bound to the teacher that was loaded when it was made.

    Another teacher or tokenizer is refused by the daemon (TEACHER_CHANGED, TOKENIZER_MISMATCH); for a teacher that is
    no longer in memory its cache answers. While the daemon's queue is full or it is loading, calls wait. Once
    `should_stop` says so, they end with CANCELLED.
    """

    def __init__(
        self, client: Client, *, use_cache: bool = True, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._client = client
        self._connection = Interruptible(client.connection, should_stop)
        self._use_cache = use_cache
        self._info = client.loaded_teacher()
        self._expected = Expected(self._info.digest, self._info.tokenizer_digest)
        self._head: TeacherHead | None = None

    @property
    def info(self) -> TeacherInfo:
        """Facts of the teacher."""
        return self._info

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        """Score token sequences; one result per request, in order."""
        return patiently(lambda: score(self._connection, requests, self._expected, use_cache=self._use_cache))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
        """Let the teacher continue prompts; one completion per request, in order."""
        return patiently(lambda: generate(self._connection, requests, self._expected, use_cache=self._use_cache))

    def head(self) -> TeacherHead:
        """The teacher's output head, fetched once."""
        if self._head is None:
            self._head = fetch_head(self._connection, self._expected)
        return self._head

    def unload(self) -> None:
        """Free the teacher's memory; from then on the daemon answers what its cache holds, and nothing else.

        Raises:
            OpdError: TEACHER_IN_USE while another run needs the teacher.
        """
        self._client.unload_teacher()


def patiently(call: Callable[[], T]) -> T:
    """Make a call that has no effect but its answer, again while the daemon has no room for it or is loading."""
    deadline = time.monotonic() + BUSY_PATIENCE
    while True:
        try:
            return call()
        except OpdError as error:
            if error.reason not in BUSY or time.monotonic() > deadline:
                raise
            hint = error.metadata.get(RETRY_AFTER)
        time.sleep(min(int(hint) / 1000, LONGEST_DELAY) if hint else BUSY_DELAY)
