"""What the teacher is asked: scores, completions, the head and token ids, straight from the engine onto the wire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from opd_daemon.errors import OpdError, Reason, invalid
from opd_daemon.rpc.access import caller
from opd_daemon.rpc.interceptor import Context
from opd_daemon.teacher.service import TeacherService
from opd_daemon.teacher.tokenizer import TextTokenizer
from opd_daemon.teacher.validation import MOST_TEMPERATURES, check_count, check_few, check_ids, check_length
from opd_daemon.textstream import TextStream
from opd_daemon.types import GeneratedToken, ScoreRequest, TeacherInfo
from opd_daemon.v1 import teacher_pb2 as pb
from opd_daemon.wire import arrays as wire
from opd_daemon.wire import headers

T = TypeVar("T")

MOST_OF_A_NAME = 64
MESSAGE_BYTES = 1 << 20
# Clients take 4 MiB.
MOST_ANSWER_BYTES = 3 << 20
# A tokenizer may take a thousand bytes for each while it works, and ten microseconds.
MOST_CHARACTERS = MOST_IDS = 1 << 19
# Longer texts, and those of more ids, wait for each other; shorter ones only for shorter ones.
SHORT = 1 << 14


class Answers:
    """Thin layer over `teacher.service.TeacherService`, for the calls of that name in the contract."""

    def __init__(self, teacher: TeacherService) -> None:
        self._teacher = teacher
        # A thread each, where calls that are given up while they wait are not done.
        self._short, self._long = (ThreadPoolExecutor(1, name) for name in ("texts", "long-texts"))

    async def compute_logprobs(
        self, request: pb.ComputeLogprobsRequest, context: Context
    ) -> AsyncIterator[pb.ComputeLogprobsResponse]:
        """ComputeLogprobs."""
        info = self._teacher.meant(request.expected_teacher_digest, request.expected_tokenizer_digest)
        check_count("sequences", len(request.sequences))
        requests = await self._score_requests(request, info)
        yield pb.ComputeLogprobsResponse(identity=_identity(info))
        run_id = caller.get().run_id
        results = self._teacher.score(
            requests,
            teacher=info,
            client=_client(context),
            use_cache=not request.skip_cache,
            apart=bool(run_id),  # a run resumes to the bit, whoever else asked the teacher meanwhile
            deadline=_deadline(context),
        )
        async with aclosing(results):
            async for index, result in results:
                from_text = request.sequences[index].tokens.WhichOneof("input") != "token_ids"
                for number, block in enumerate(wire.score_blocks(index, requests[index], result)):
                    if from_text and number == 0:
                        block.token_ids = wire.pack(requests[index].token_ids)
                    yield pb.ComputeLogprobsResponse(block=block)

    async def generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Generate."""
        info = self._teacher.meant(request.expected_teacher_digest, request.expected_tokenizer_digest)
        check_count("prompts", len(request.prompts))
        tokenizer = await self._teacher.tokenizer(info)
        _require_few_ids(request, info)
        ids = [
            await self._fitting_ids(entry.tokens, f"prompts[{index}].tokens", info)
            for index, entry in enumerate(request.prompts)
        ]
        requests = [wire.prompt_from_proto(entry, ids[index].tolist()) for index, entry in enumerate(request.prompts)]
        for number, prompts in enumerate(_pieces([pb.TokenIds(ids=wire.pack(prompt)) for prompt in ids])):
            yield pb.GenerateResponse(identity=None if number else _identity(info), prompts=prompts)
        texts = [TextStream(tokenizer.decode, info.eos_token_ids) for _ in requests]
        tokens = self._teacher.generate(
            requests,
            teacher=info,
            client=_client(context),
            use_cache=not request.skip_cache,
        )
        async with aclosing(tokens):
            async for index, token in tokens:
                yield pb.GenerateResponse(block=_block(index, token, texts[index]))

    async def head(self, request: pb.GetHeadRequest) -> AsyncIterator[pb.GetHeadResponse]:
        """GetHead."""
        info = self._teacher.loaded(request.expected_teacher_digest)
        if not info.supports_hidden:
            message = f"the head of {info.name} can't be split off: {info.hidden_refusal}; use top_k instead of hidden"
            raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, message)
        head = await self._teacher.head()
        yield pb.GetHeadResponse(identity=_identity(info), facts=wire.head_facts(head, info))
        for piece in wire.head_pieces(head):
            yield pb.GetHeadResponse(piece=piece)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Tokenize."""
        info = self._teacher.loaded()
        ids = await self._token_ids(request.tokens, "tokens", info)
        if request.tokens.HasField("token_ids") and len(ids) > MOST_IDS:
            raise invalid("tokens.token_ids", f"{len(ids)} ids; send at most {MOST_IDS} in one call")
        check_ids("tokens.token_ids", ids, info)
        tokenizer = await self._teacher.tokenizer(info)
        text = await self._in_turn(len(ids), tokenizer.decode, ids.tolist())
        if (needed := 4 * len(ids) + len(text.encode())) > MOST_ANSWER_BYTES:
            found = f"{len(ids)} ids and their text are {needed} bytes, more than an answer holds; send less at once"
            raise invalid("tokens", found)
        return pb.TokenizeResponse(token_ids=pb.TokenIds(ids=wire.pack(ids)), text=text, identity=_identity(info))

    async def _score_requests(self, request: pb.ComputeLogprobsRequest, info: TeacherInfo) -> list[ScoreRequest]:
        check_few("masked_token_ids", len(request.masked_token_ids), info.padded_vocab_size)
        check_few("outputs.log_z_temperatures", len(request.outputs.log_z_temperatures), MOST_TEMPERATURES)
        wants = wire.outputs_from_proto(request.outputs)
        masked = tuple(request.masked_token_ids)
        return [
            ScoreRequest(
                token_ids=await self._fitting_ids(entry.tokens, f"sequences[{index}].tokens", info),
                score_from=entry.score_from or 1,
                wants=wants,
                candidate_ids=wire.candidates_from_proto(entry, f"sequences[{index}]"),
                masked_token_ids=masked,
            )
            for index, entry in enumerate(request.sequences)
        ]

    async def _fitting_ids(self, tokens: pb.TokenInput, name: str, info: TeacherInfo) -> npt.NDArray[np.int32]:
        """As `_token_ids`, where the teacher takes so many."""
        ids = await self._token_ids(tokens, name, info)
        check_length(f"{name}.{tokens.WhichOneof('input')}", len(ids), info)
        return ids

    async def _token_ids(self, tokens: pb.TokenInput, name: str, info: TeacherInfo) -> npt.NDArray[np.int32]:
        match tokens.WhichOneof("input"):
            case "token_ids":
                return wire.unpack(tokens.token_ids.ids, f"{name}.token_ids")
            case "text":
                tokenizer = await self._teacher.tokenizer(info)
                _require_short(len(tokens.text), f"{name}.text")
                found = await self._in_turn(len(tokens.text), tokenizer.encode, tokens.text)
                return np.asarray(found, dtype=np.int32)
            case "chat":
                tokenizer = await self._teacher.tokenizer(info)
                characters = sum(len(entry.role) + len(entry.content) for entry in tokens.chat.messages)
                _require_short(characters, f"{name}.chat")
                ids = await self._in_turn(characters, _render, tokenizer, tokens.chat, f"{name}.chat")
                return np.asarray(ids, dtype=np.int32)
            case _:
                raise invalid(name, "empty: give token_ids, text or chat")

    async def _in_turn(self, size: int, function: Callable[..., T], *arguments: Any) -> T:
        """Call it off the event loop, which has no time for texts."""
        turn = self._short if size <= SHORT else self._long
        return await asyncio.get_running_loop().run_in_executor(turn, function, *arguments)


def _render(tokenizer: TextTokenizer, chat: pb.Chat, name: str) -> Sequence[int]:
    if not chat.messages:
        raise invalid(f"{name}.messages", "none given; a chat has at least one message")
    messages = [{"role": entry.role, "content": entry.content} for entry in chat.messages]
    try:
        return tokenizer.render_chat(messages, chat.add_generation_prompt)
    except OpdError as refusal:
        # Under the name of the field it has in this call.
        raise invalid(name, " ".join(refusal.violations[0].description.split())) from None


def _pieces(prompts: Sequence[pb.TokenIds]) -> Iterator[list[pb.TokenIds]]:
    """Prompts in order, as many in a message as a client takes."""
    piece: list[pb.TokenIds] = []
    size = 0
    for prompt in prompts:
        if piece and size + prompt.ByteSize() > MESSAGE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(prompt)
        size += prompt.ByteSize()
    yield piece


def _require_few_ids(request: pb.GenerateRequest, info: TeacherInfo) -> None:
    """Of those that go with the prompts: for each as many as there are tokens, and together what a text may have."""
    together = 0
    for index, prompt in enumerate(request.prompts):
        for name, ids in (("stop_token_ids", prompt.stop_token_ids), ("masked_token_ids", prompt.masked_token_ids)):
            check_few(f"prompts[{index}].{name}", len(ids), info.padded_vocab_size)
            together += len(ids)
    check_few("prompts", together, MOST_IDS)


def _require_short(characters: int, name: str) -> None:
    if characters > MOST_CHARACTERS:
        raise invalid(name, f"{characters} characters; send at most {MOST_CHARACTERS}, or token ids")


def _client(context: Context) -> str:
    """With whom this call shares a turn: its run, the name it gives itself, or its connection."""
    named = dict(context.invocation_metadata() or ()).get(headers.CLIENT, "")
    return caller.get().run_id or str(named)[:MOST_OF_A_NAME] or str(context.peer())


def _deadline(context: Context) -> float | None:
    remaining: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
    return None if remaining is None else time.monotonic() + remaining


def _identity(info: TeacherInfo) -> pb.TeacherIdentity:
    return pb.TeacherIdentity(teacher_digest=info.digest, tokenizer_digest=info.tokenizer_digest)


def _block(index: int, token: GeneratedToken, text: TextStream) -> pb.GeneratedBlock:
    return wire.generated_block(index, [token], text.add(token.token_id, last=bool(token.finish_reason)))
