"""The teacher over the wire, as clients and trainers use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opd_daemon.client import Client, RemoteTeacher, teacher
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants, TeacherState
from tests.tiny import write_tiny_qwen2


def requests(count: int = 6) -> list[ScoreRequest]:
    generator = np.random.default_rng(0)
    wants = (ScoreWants(top_k=4), ScoreWants(hidden=True))
    found = []
    for index in range(count):
        ids = generator.integers(0, 300, 5 + index, dtype=np.int32)
        candidates = generator.integers(0, 300, (len(ids) - 1, 3), dtype=np.int32)
        found.append(ScoreRequest(ids, 1, wants[index % 2], candidates))
    return found


def test_loading_reports_phases_and_ends_ready(client: Client, tiny_teacher: Path) -> None:
    client.unload_teacher()
    assert client.teacher()[0] is TeacherState.UNLOADED
    phases = [progress.phase for progress in client.load_teacher(str(tiny_teacher))]
    assert phases[0] == "checking"
    assert phases[-1] == "ready"
    assert client.loaded_teacher().name == tiny_teacher.name


def test_without_a_teacher_the_error_says_how_to_load_one(client: Client) -> None:
    client.unload_teacher()
    with pytest.raises(OpdError, match="load one with 'opd teacher load PATH'"):
        client.loaded_teacher()


def test_text_and_ids_turn_into_each_other(client: Client) -> None:
    ids = client.tokenize("The tide comes in.")
    assert client.detokenize(ids) == "The tide comes in."
    chat = client.tokenize_chat([{"role": "user", "content": "The tide comes in."}])
    assert client.detokenize(chat).endswith("<|im_start|>assistant\n")


def test_large_work_is_split_into_calls_and_comes_back_in_order(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests()
    whole = client.score(asked, use_cache=False)
    assert len(teacher.score_calls(asked)) == 2
    assert len(teacher.score_calls(asked, limit=200)) == len(asked)
    monkeypatch.setattr(teacher, "REQUEST_BYTES", 200)
    for one, other, request in zip(whole, client.score(asked, use_cache=False), asked, strict=True):
        assert one.scores.arrays().keys() == other.scores.arrays().keys()
        assert one.scores.candidate_logprobs is not None
        assert one.scores.candidate_logprobs.shape == (request.rows, 3)
        for name, values in one.scores.arrays().items():
            np.testing.assert_allclose(values, other.scores.arrays()[name], atol=1e-4, err_msg=name)


def test_calls_hold_no_more_than_their_limit_of_ids() -> None:
    asked = requests(20)
    calls = teacher.score_calls(asked, limit=1000)
    assert sorted(index for call in calls for index in call) == list(range(20))
    assert all(sum(4 * asked[index].token_ids.size for index in call) < 1000 for call in calls)


def test_generation_streams_the_text_of_the_tokens_it_returns(client: Client) -> None:
    prompt = tuple(client.tokenize("Could you explain"))
    asked = [GenerateRequest(prompt, 8, temperature=0.0), GenerateRequest(prompt[:1], 5, temperature=0.0)]
    pieces = list(client.stream_generation(asked))
    tokens = client.generate(asked)
    for index in range(2):
        streamed = [token.token_id for piece in pieces if piece.prompt_index == index for token in piece.tokens]
        assert streamed == [token.token_id for token in tokens[index]]
        assert tokens[index][-1].finish_reason in {"stop", "length"}


def test_a_trainers_teacher_has_info_head_and_scores(client: Client) -> None:
    remote = RemoteTeacher(client)
    head = remote.head()
    assert head.tensors["weight"].shape[0] == remote.info.padded_vocab_size
    assert remote.head() is head
    asked = requests(2)
    assert [len(result.scores.arrays()) > 0 for result in remote.score(asked)] == [True, True]
    assert len(remote.generate([GenerateRequest((1, 2), 3)])[0]) <= 3


def test_a_trainers_teacher_refuses_to_be_another_one(client: Client, tmp_path: Path) -> None:
    remote = RemoteTeacher(client)
    for _ in client.load_teacher(str(write_tiny_qwen2(tmp_path / "other", seed=9)), force=True):
        pass
    with pytest.raises(OpdError) as found:
        remote.score([ScoreRequest(np.array([4, 3, 2, 1], np.int32), 1)])
    assert found.value.reason is Reason.TEACHER_CHANGED


def test_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "BUSY_DELAY", 0.01)
    outcomes = [OpdError(Reason.QUEUE_FULL, "full"), OpdError(Reason.TEACHER_LOADING, "loading")]

    def call() -> str:
        if outcomes:
            raise outcomes.pop()
        return "answer"

    assert teacher.patiently(call) == "answer"


def test_other_failures_are_not_waited_for() -> None:
    def call() -> None:
        raise OpdError(Reason.TEACHER_NOT_LOADED, "none")

    with pytest.raises(OpdError, match="none"):
        teacher.patiently(call)


def test_cache_statistics_count_what_was_asked_twice(client: Client) -> None:
    client.prune_cache(0)
    before = client.cache_stats()
    asked = requests(1)
    client.score(asked)
    assert client.score(asked)[0].cached
    after = client.cache_stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)


def test_after_unloading_the_cache_answers_and_says_what_it_lacks(client: Client) -> None:
    remote = RemoteTeacher(client)
    asked = requests()
    prompts = [GenerateRequest((5, 6, 7), 4, temperature=0.0)]
    first, answers = remote.score(asked), remote.generate(prompts)
    head = remote.head()
    remote.unload()
    assert client.teacher()[0] is TeacherState.UNLOADED
    for before, after in zip(first, remote.score(asked), strict=True):
        assert after.cached
        for name, value in before.scores.arrays().items():
            np.testing.assert_array_equal(after.scores.arrays()[name], value)
    again = remote.generate(prompts)
    assert [token.token_id for token in again[0]] == [token.token_id for token in answers[0]]
    assert remote.head() is head
    with pytest.raises(OpdError, match="1 of 2 sequences are not in the cache") as caught:
        remote.score([asked[0], ScoreRequest(np.array([9, 8, 7, 6], np.int32), 1, asked[0].wants)])
    assert caught.value.reason is Reason.TEACHER_NOT_LOADED


def test_a_full_queue_is_asked_again_when_the_daemon_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(teacher.time, "sleep", slept.append)
    outcomes = [OpdError(Reason.QUEUE_FULL, "full", retry_after_milliseconds=wait) for wait in (1_250, 90_000)]

    def call() -> str:
        if outcomes:
            raise outcomes.pop(0)
        return "answer"

    assert teacher.patiently(call) == "answer"
    assert slept == [1.25, teacher.LONGEST_DELAY]
