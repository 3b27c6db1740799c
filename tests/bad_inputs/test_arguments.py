"""Arguments at and beyond every edge: the field is named with its cure, and the daemon serves on."""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

import math

import numpy as np
import pytest

from opd_daemon.errors import Code, Reason
from opd_daemon.types import ScoreWants
from opd_daemon.v1 import run_pb2
from tests.bad_inputs.stage import (
    CONTEXT,
    IN_FUTURE,
    MISMATCH,
    PAGE,
    REQUEST,
    STORE_CHANGED,
    VOCABULARY,
    Fault,
    Stage,
    check,
    refusal,
)

CALLS_OF_A_RUN = ["GetRun", "StopRun", "ResumeRun", "DeleteRun", "ListMetrics", "ListCheckpoints", "DownloadAdapter", "WatchEvents"]  # fmt: skip

FAULTS: dict[str, Fault] = {
    # Scores and completions
    "id of no token": Fault(18, lambda s: s.score(1, VOCABULARY), REQUEST, "sequences[0].tokens.token_ids", f"id {VOCABULARY} at place 1 is no token"),
    "negative id": Fault(18, lambda s: s.score(1, -1), REQUEST, "sequences[0].tokens.token_ids", "id -1 at place 1 is no token"),
    "empty sequence": Fault(17, lambda s: s.score(), REQUEST, "sequences[0].tokens.token_ids", "0 tokens; a token to score needs one before it"),
    "too long": Fault(17, lambda s: s.score(*[1] * (CONTEXT + 1)), REQUEST, "sequences[0].tokens.token_ids", f"{CONTEXT + 1} tokens; teacher takes at most {CONTEXT}"),
    "top_k 0": Fault(19, lambda s: s.score_raw(bytes(8), top_k=0), REQUEST, "outputs.top_k", "use 1 or more"),
    "top_k too large": Fault(19, lambda s: s.score(1, 2, wants=ScoreWants(top_k=VOCABULARY + 1)), REQUEST, "outputs.top_k", f"between 1 and {VOCABULARY}"),
    "half an id": Fault(22, lambda s: s.score_raw(bytes(7)), REQUEST, "sequences[0].tokens.token_ids", "7 bytes"),
    "temperature of log Z": Fault(20, lambda s: s.score(1, 2, wants=ScoreWants(log_z_temperatures=(math.nan,))), REQUEST, "outputs.log_z_temperatures", "positive number"),
    "candidate of no token": Fault(18, lambda s: s.score(1, 2, candidate_ids=np.array([[VOCABULARY]], np.int32)), REQUEST, "sequences[0].candidate_ids", f"id {VOCABULARY}"),
    "text of no token": Fault(18, lambda s: s.client.detokenize([-1]), REQUEST, "tokens.token_ids", "id -1 at place 0 is no token"),
    "one token": Fault(17, lambda s: s.score(1), REQUEST, "sequences[0].tokens.token_ids", "1 tokens; a token to score needs one before it"),
    "largest id": Fault(18, lambda s: s.score(1, 2**31 - 1), REQUEST, "sequences[0].tokens.token_ids", "id 2147483647 at place 1 is no token"),
    "first row beyond the last": Fault(17, lambda s: s.score_raw(bytes(8), sequence={"score_from": 2**31 - 1}, token_stats=True), REQUEST, "sequences[0].score_from", "between 1 and 1"),
    "negative row": Fault(17, lambda s: s.score_raw(bytes(8), sequence={"score_from": -1}, token_stats=True), REQUEST, "sequences[0].score_from", "between 1 and 1"),
    "rows of no candidates": Fault(22, lambda s: s.score_raw(bytes(8), sequence={"candidate_ids": bytes(8), "candidates": 3}), REQUEST, "sequences[0].candidates", "no whole number of rows of 3"),
    "rows of more than memory": Fault(22, lambda s: s.score_raw(bytes(8), sequence={"candidate_ids": bytes(8), "candidates": 2**31 - 1}), REQUEST, "sequences[0].candidates", "no whole number of rows"),
    "negative candidates": Fault(22, lambda s: s.score_raw(bytes(8), sequence={"candidate_ids": bytes(8), "candidates": -1}), REQUEST, "sequences[0].candidates", "no whole number of rows"),
    "too many rows of candidates": Fault(22, lambda s: s.score_raw(bytes(8), sequence={"candidate_ids": bytes(8), "candidates": 1}), REQUEST, "sequences[0].candidate_ids", "must be (1, at least 1)"),
    "too many temperatures": Fault(20, lambda s: s.score_raw(bytes(8), log_z_temperatures=65 * [1.0]), REQUEST, "outputs.log_z_temperatures", "65 of them; send at most 64"),
    "too many sequences": Fault(17, lambda s: s.score_many(16_385), REQUEST, "sequences", "send at most 16384"),
    "endless text": Fault(17, lambda s: s.tokenize(text=600_000 * "a"), REQUEST, "tokens.text", "send at most 524288"),
    "endless chat": Fault(17, lambda s: s.tokenize(chat={"messages": [{"role": "user", "content": 600_000 * "a"}]}), REQUEST, "tokens.chat", "send at most 524288"),
    "endless ids": Fault(17, lambda s: s.tokenize(token_ids={"ids": bytes(20_000_000)}), REQUEST, "tokens.token_ids", "5000000 ids; send at most 524288"),
    "ids of endless text": Fault(17, lambda s: s.client.detokenize([400] * 300_000), REQUEST, "tokens", "more than an answer holds"),
    "chat of nobody": Fault(3, lambda s: s.tokenize(chat={}), REQUEST, "tokens.chat.messages", "none given"),
    "no alternatives": Fault(19, lambda s: s.generate(1, top_logprobs=-1), REQUEST, "prompts[0].top_logprobs", "must be 0 to"),
    "too many alternatives": Fault(19, lambda s: s.generate(1, top_logprobs=VOCABULARY + 1), REQUEST, "prompts[0].top_logprobs", f"must be 0 to {VOCABULARY}"),
    "no tokens": Fault(17, lambda s: s.generate(1, max_tokens=0), REQUEST, "prompts[0].max_tokens", "at least 1"),
    "most tokens": Fault(17, lambda s: s.generate(1, max_tokens=2**31 - 1), REQUEST, "prompts[0].max_tokens", f"at most {CONTEXT} together"),
    "other tokenizer": Fault(32, lambda s: s.score_expecting("0" * 64), MISMATCH, "", "not the expected 000000000000"),
    "negative size": Fault(20, lambda s: s.prune(-1), REQUEST, "max_bytes", "-1 is negative"),
    "empty prompt": Fault(17, lambda s: s.generate(), REQUEST, "prompts[0].tokens.token_ids", "at least one token"),
    "prompt of no token": Fault(18, lambda s: s.generate(VOCABULARY), REQUEST, "prompts[0].tokens.token_ids", "is no token"),
    "no room to answer": Fault(17, lambda s: s.generate(1, max_tokens=CONTEXT), REQUEST, "prompts[0].max_tokens", f"at most {CONTEXT} together"),
    "NaN for sampling": Fault(20, lambda s: s.generate(1, temperature=math.nan), REQUEST, "prompts[0].temperature", "0 (greedy) or positive"),
    "a prompt longer than any": Fault(17, lambda s: s.generate(*[1] * 1_000_000), REQUEST, "prompts[0].tokens.token_ids", f"1000000 tokens; teacher takes at most {CONTEXT}"),
    "more stops than tokens": Fault(17, lambda s: s.generate(1, stop_token_ids=(1,) * 100_000), REQUEST, "prompts[0].stop_token_ids", "100000 of them; send at most"),
    "more masks than tokens": Fault(17, lambda s: s.generate(1, masked_token_ids=(1,) * 100_000), REQUEST, "prompts[0].masked_token_ids", "100000 of them; send at most"),
    "a completion of no token": Fault(18, lambda s: s.generate(1, masked_token_ids=tuple(range(VOCABULARY))), REQUEST, "prompts[0].masked_token_ids", "masks the whole vocabulary"),
    "more candidates than tokens": Fault(22, lambda s: s.score(1, 2, candidate_ids=np.zeros((1, VOCABULARY + 1), np.int32)), REQUEST, "sequences[0].candidate_ids", f"has {VOCABULARY} tokens"),
    # Pages and cursors
    "page of nobody": Fault(27, lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_token="x")), PAGE, "page_token", "not a token"),
    "endless page": Fault(27, lambda s: s.runs.ListMetrics(run_pb2.ListMetricsRequest(run_id="x", page_token=30 * "9")), PAGE, "page_token", "not a token"),
    "negative page": Fault(20, lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_size=-1)), REQUEST, "page_size", "-1 is negative; use 0"),
    "unknown state": Fault(29, lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(states=[99])), REQUEST, "states", "99 is no state"),  # type: ignore[list-item]
    "cursor in the future": Fault(28, lambda s: s.watch(after_revision=2**62), IN_FUTURE, "", "the newest revision is"),
    "largest cursor": Fault(28, lambda s: s.watch(after_revision=2**63 - 1), IN_FUTURE, "", "the newest revision is"),
    "page beyond any": Fault(27, lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_token="-1")), PAGE, "page_token", "not a token"),
    "page of other digits": Fault(27, lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_token="١")), PAGE, "page_token", "not a token"),
    "long request id": Fault(26, lambda s: s.client.create_run(s.values(), request_id=65 * "x"), REQUEST, "request_id", "use at most 64"),
    "negative cursor": Fault(28, lambda s: s.watch(after_revision=-1), REQUEST, "after_revision", "use 0 for everything kept"),
    "other store": Fault(28, lambda s: s.watch(expected_store_id="other"), STORE_CHANGED, "", "not other: start again with after_revision 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_the_daemon_serves_on(stage: Stage, name: str) -> None:
    check(stage, FAULTS[name])


@pytest.mark.parametrize("call", CALLS_OF_A_RUN)
@pytest.mark.parametrize("run_id", ["nope", "../nope", "a\0b"])
def test_unknown_runs_are_not_found(stage: Stage, call: str, run_id: str) -> None:
    message = getattr(run_pb2, f"{call}Request")(run_id=run_id)

    def ask() -> None:
        answer = getattr(stage.runs, call)(message)
        if call in ("DownloadAdapter", "WatchEvents"):
            next(iter(answer))

    error = refusal(ask)
    assert error.reason is Reason.RUN_NOT_FOUND
    assert f"no run {run_id!r}" in error.message
    assert stage.client.teacher()[0] == "READY"


@pytest.mark.parametrize("tokens", [2, CONTEXT])
@pytest.mark.parametrize("top_k", [1, VOCABULARY])
def test_the_edges_themselves_are_served(stage: Stage, tokens: int, top_k: int) -> None:
    stage.score(*[1] * tokens, wants=ScoreWants(top_k=top_k))
    stage.generate(*[1] * (tokens - 1), max_tokens=1)


# What an empty request lacks; "" where nothing is needed.
LACKS = {
    "TeacherService/LoadTeacher": "model_path",
    "TeacherService/ComputeLogprobs": "sequences",
    "TeacherService/Generate": "prompts",
    "TeacherService/Tokenize": "tokens",
    "RunService/CreateRun": "config.base_model_path config.prompts_path config.teacher_model_path",
    "RunService/CompareModels": "run_id",
    "RunService/DownloadReport": "run_id",
    **{f"RunService/{call}": "run_id" for call in CALLS_OF_A_RUN if call != "WatchEvents"},
}


@pytest.mark.parametrize("call", LACKS)
def test_an_empty_request_is_told_what_it_lacks(stage: Stage, call: str) -> None:
    error = refusal(lambda: stage.raw_call(call, b""))
    assert error.code is Code.INVALID_ARGUMENT
    assert sorted(violation.field for violation in error.violations) == LACKS[call].split()
    assert stage.serves()
