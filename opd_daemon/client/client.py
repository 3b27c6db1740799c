"""The client: one method a call of the contract, in domain types."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.protobuf.json_format import ParseError

from opd_daemon.client import catalog
from opd_daemon.client import teacher as remote
from opd_daemon.client.adapter import Choice, save_adapter
from opd_daemon.client.connection import Connection, find_endpoint
from opd_daemon.client.report import ReportFile, read_report
from opd_daemon.client.upload import send_prompts
from opd_daemon.client.watch import Watch
from opd_daemon.config import parse_config
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import (
    CachedScores,
    CacheStats,
    Checkpoint,
    ComparisonRequest,
    Event,
    Gauges,
    GeneratedToken,
    GenerateRequest,
    LoadProgress,
    ModelAnswer,
    Run,
    RunState,
    ScoreRequest,
    TeacherInfo,
    TeacherState,
)
from opd_daemon.v1 import catalog_pb2, run_pb2, teacher_pb2
from opd_daemon.v1.catalog_pb2_grpc import CatalogServiceStub
from opd_daemon.v1.run_pb2_grpc import RunServiceStub
from opd_daemon.v1.teacher_pb2_grpc import TeacherServiceStub
from opd_daemon.wire import arrays as wire_arrays
from opd_daemon.wire import comparison as wire_comparison
from opd_daemon.wire import runs as wire_runs
from opd_daemon.wire import teacher as wire_teacher
from opd_daemon.wire.events import evaluation_from_proto, metrics_from_proto, state_to_proto

TIMEOUT = 30.0
PLAN_TIMEOUT = 300.0
"""CreateRun reads prompt files and tokenizers, and may have to hash a large model's files."""

WATCH_PATIENCE = 30.0


class Client:
    """A connection to one daemon: of the given address and token, of `$OPD_ADDRESS` and `$OPD_TOKEN`, or of a home.

    Every method raises `OpdError`. A context manager that closes the connection.
    """

    def __init__(self, address: str | None = None, token: str | None = None, *, home: Home | None = None) -> None:
        home = home or Home.default()
        self.connection = Connection(home, lambda: find_endpoint(home, address, token))

    @classmethod
    def find(cls, home: Home | None = None, address: str | None = None, token: str | None = None) -> Self:
        """The daemon of `home` (default `$OPD_HOME`), unless an address and a token, or their variables, name another.

        Raises:
            OpdError: DAEMON_NOT_RUNNING.
        """
        return cls(address, token, home=home)

    @property
    def channel(self) -> grpc.Channel:
        """The channel, for stubs of one's own; its calls carry the token."""
        return self.connection.channel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    # The teacher

    def teacher(self) -> tuple[TeacherState, TeacherInfo | None, str]:
        """State, facts (None unless READY) and why the last load failed."""
        answer = self._read(TeacherServiceStub, "GetTeacher", teacher_pb2.GetTeacherRequest())
        return wire_teacher.teacher_from_proto(answer.teacher)

    def loaded_teacher(self) -> TeacherInfo:
        """Facts of the teacher in memory.

        Raises:
            OpdError: TEACHER_NOT_LOADED.
        """
        state, info, failure = self.teacher()
        if info is None:
            why = failure or f"its state is {state}"
            message = f"no teacher is loaded ({why}); load one with 'opd teacher load PATH'"
            raise OpdError(Reason.TEACHER_NOT_LOADED, message, state=state)
        return info

    def load_teacher(self, path: str, *, force: bool = False) -> Iterator[LoadProgress]:
        """Load a teacher, reporting progress; the last report has the phase "ready"."""
        request = teacher_pb2.LoadTeacherRequest(model_path=path, force=force)
        for answer in self.connection.stream(TeacherServiceStub, "LoadTeacher", request):
            yield wire_teacher.progress_from_proto(answer)

    def unload_teacher(self, *, force: bool = False) -> None:
        """Free the teacher's memory."""
        request = teacher_pb2.UnloadTeacherRequest(force=force)
        self.connection.unary(TeacherServiceStub, "UnloadTeacher", request, timeout=PLAN_TIMEOUT)

    def score(
        self, requests: Sequence[ScoreRequest], *, teacher_digest: str = "", use_cache: bool = True
    ) -> list[CachedScores]:
        """Score token sequences; one result per request, in order."""
        expected = remote.Expected(teacher_digest)
        return remote.score(self.connection, requests, expected, use_cache=use_cache)

    def generate(self, requests: Sequence[GenerateRequest], *, use_cache: bool = True) -> list[list[GeneratedToken]]:
        """Let the teacher continue prompts; one completion per request, in order."""
        return remote.generate(self.connection, requests, remote.ANY_TEACHER, use_cache=use_cache)

    def stream_generation(
        self, requests: Sequence[GenerateRequest], *, use_cache: bool = True
    ) -> Iterator[remote.GeneratedPiece]:
        """Let the teacher continue prompts, as tokens arrive; pieces of different prompts alternate."""
        return remote.stream_generation(self.connection, requests, remote.ANY_TEACHER, use_cache=use_cache)

    def head(self) -> TeacherHead:
        """The teacher's output head."""
        return remote.fetch_head(self.connection, remote.ANY_TEACHER)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without any template."""
        return self._tokens(teacher_pb2.TokenInput(text=text))

    def tokenize_chat(self, messages: Iterable[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat in the teacher's template; messages have `role` and `content`."""
        entries = [teacher_pb2.ChatMessage(role=entry["role"], content=entry["content"]) for entry in messages]
        chat = teacher_pb2.Chat(messages=entries, add_generation_prompt=add_generation_prompt)
        return self._tokens(teacher_pb2.TokenInput(chat=chat))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        request = teacher_pb2.TokenizeRequest(tokens=wire_arrays.token_input(ids))
        text: str = self._read(TeacherServiceStub, "Tokenize", request).text
        return text

    def _tokens(self, tokens: teacher_pb2.TokenInput) -> list[int]:
        answer = self._read(TeacherServiceStub, "Tokenize", teacher_pb2.TokenizeRequest(tokens=tokens))
        return [int(token) for token in np.frombuffer(answer.token_ids.ids, dtype=wire_arrays.INT32)]

    def cache_stats(self) -> CacheStats:
        """What the teacher cache holds and has saved."""
        answer = self._read(TeacherServiceStub, "GetCacheStats", teacher_pb2.GetCacheStatsRequest())
        return wire_teacher.cache_stats_from_proto(answer.stats)

    def prune_cache(self, max_bytes: int | None = None) -> CacheStats:
        """Remove least recently used entries until `max_bytes` (default: the daemon's limit) are left."""
        request = teacher_pb2.PruneCacheRequest(max_bytes=max_bytes)
        answer = self.connection.unary(TeacherServiceStub, "PruneCache", request, timeout=PLAN_TIMEOUT)
        return wire_teacher.cache_stats_from_proto(answer.stats)

    # Runs

    def create_run(
        self,
        values: Mapping[str, Any],
        *,
        preset: str = "",
        request_id: str = "",
        validate_only: bool = False,
        machine: str = "",
        force: bool = False,
    ) -> tuple[Run, int]:
        """Check, plan and (unless validate_only) accept a run; with the log's revision at that moment.

        machine: with validate_only, plan for that machine, such as "M4 Max 64 GB". force: accept a run that won't fit.

        Raises:
            OpdError: INVALID_RUN_CONFIG with one violation per fault; RUN_REFUSED; REQUEST_ID_REUSED; OUT_OF_MEMORY.
        """
        request = run_pb2.CreateRunRequest(
            request_id=request_id,
            config=_config_message(values),
            preset=preset,
            validate_only=validate_only,
            machine=machine,
            force=force,
        )
        repeatable = bool(request_id) or validate_only
        answer = self.connection.unary(RunServiceStub, "CreateRun", request, timeout=PLAN_TIMEOUT, retry=repeatable)
        return wire_runs.run_from_proto(answer.run), answer.revision

    def upload_prompts(self, file: Path) -> str:
        """Send a JSONL file to a daemon on another machine; its path there, for `prompts_path`.

        Raises:
            OpdError: INVALID_REQUEST for a file that can't be read, is empty or too large; DISK_FULL.
        """
        return send_prompts(self.connection, file)

    def run(self, run_id: str) -> tuple[Run, int]:
        """One run, and the revision of the log at which it was read: watch after it to miss nothing."""
        answer = self._read(RunServiceStub, "GetRun", run_pb2.GetRunRequest(run_id=run_id))
        return wire_runs.run_from_proto(answer.run), answer.revision

    def runs(self, states: Iterable[RunState] = ()) -> Iterator[Run]:
        """Runs, newest first, page by page as they are asked for."""
        wanted, page_token = [state_to_proto(state) for state in states], ""
        while True:
            request = run_pb2.ListRunsRequest(states=wanted, page_token=page_token)
            answer = self._read(RunServiceStub, "ListRuns", request)
            yield from map(wire_runs.run_from_proto, answer.runs)
            page_token = answer.next_page_token
            if not page_token:
                return

    def stop(self, run_id: str) -> Run:
        """Stop a run after its step, with a checkpoint; returns without waiting for that."""
        answer = self._read(RunServiceStub, "StopRun", run_pb2.StopRunRequest(run_id=run_id))
        return wire_runs.run_from_proto(answer.run)

    def resume(self, run_id: str) -> tuple[Run, int]:
        """Take a run up again from its last checkpoint; the run and the step it goes on from."""
        request = run_pb2.ResumeRunRequest(run_id=run_id)
        answer = self.connection.unary(RunServiceStub, "ResumeRun", request, timeout=PLAN_TIMEOUT)
        return wire_runs.run_from_proto(answer.run), answer.from_step

    def delete(self, run_id: str) -> None:
        """Remove a resting run with its checkpoints, metrics and events."""
        request = run_pb2.DeleteRunRequest(run_id=run_id)
        self.connection.unary(RunServiceStub, "DeleteRun", request, timeout=TIMEOUT)

    def metrics(
        self, run_id: str, stride: int = 1
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Checkpoint | None]:
        """Every `stride`-th step's metrics, all evaluations, and the best checkpoint by validation."""
        steps: list[dict[str, Any]] = []
        evaluations: list[dict[str, Any]] = []
        best, page_token = None, ""
        while True:
            request = run_pb2.ListMetricsRequest(run_id=run_id, stride=stride, page_token=page_token)
            answer = self._read(RunServiceStub, "ListMetrics", request)
            steps.extend(map(metrics_from_proto, answer.steps))
            evaluations.extend(map(evaluation_from_proto, answer.evaluations))
            if answer.HasField("best_checkpoint"):
                best = wire_runs.checkpoint_from_proto(answer.best_checkpoint)
            page_token = answer.next_page_token
            if not page_token:
                return steps, evaluations, best

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Checkpoints on disk, oldest first."""
        answer = self._read(RunServiceStub, "ListCheckpoints", run_pb2.ListCheckpointsRequest(run_id=run_id))
        return [wire_runs.checkpoint_from_proto(entry) for entry in answer.checkpoints]

    def download_adapter(self, run_id: str, folder: Path, choice: Choice = "") -> list[Path]:
        """Write an adapter's files into `folder` and return their paths; by default the best adapter there is."""
        return save_adapter(self.connection, run_id, folder, choice)

    def compare(self, request: ComparisonRequest) -> Generator[ModelAnswer, None, None]:
        """Let a run's models answer the same prompts; pieces of the answers as they come. Leaving it ends the work."""
        message = wire_comparison.request_to_proto(request)
        with closing(self.connection.stream(RunServiceStub, "CompareModels", message)) as answers:
            for answer in answers:
                yield wire_comparison.answer_from_proto(answer)

    def report(self, run_id: str) -> Iterator[ReportFile]:
        """The report of a run that has finished: one HTML page, then its pictures as PNG.

        Raises:
            OpdError: RUN_NOT_FOUND; REPORT_NOT_FOUND.
        """
        return read_report(self.connection, run_id)

    def watch(
        self,
        after_revision: int | None = None,
        run_id: str = "",
        *,
        store_id: str = "",
        patience: float = WATCH_PATIENCE,
        on_lost: Callable[[OpdError], None] | None = None,
    ) -> Iterator[Event | Gauges]:
        """Follow the log: what comes from now on, or everything after a revision (0: from the oldest kept).

        Lost connections and restarts of the daemon are survived without gap or repetition; `on_lost` is told of each.

        Raises:
            OpdError: DAEMON_NOT_RUNNING after `patience` seconds without a daemon; REVISION_COMPACTED,
                REVISION_IN_FUTURE, STORE_CHANGED, RUN_NOT_FOUND.
        """
        return iter(Watch(self.connection, after_revision, run_id, store_id, patience=patience, on_lost=on_lost))

    # The catalogue

    def trainers(self) -> list[catalog.TrainerEntry]:
        """Training methods."""
        answer = self._read(CatalogServiceStub, "ListTrainers", catalog_pb2.ListTrainersRequest())
        return [catalog.trainer_entry(entry) for entry in answer.trainers]

    def divergences(self) -> list[catalog.DivergenceEntry]:
        """The divergences there are, built in and from plugins."""
        answer = self._read(CatalogServiceStub, "ListDivergences", catalog_pb2.ListDivergencesRequest())
        return [catalog.divergence_entry(entry) for entry in answer.divergences]

    def plugins(self) -> list[catalog.PluginEntry]:
        """Plugins, including those that failed to load."""
        answer = self._read(CatalogServiceStub, "ListPlugins", catalog_pb2.ListPluginsRequest())
        return [catalog.plugin_entry(entry) for entry in answer.plugins]

    def models(self) -> list[catalog.ModelEntry]:
        """Model folders the daemon knows."""
        answer = self._read(CatalogServiceStub, "ListModels", catalog_pb2.ListModelsRequest())
        return [catalog.model_entry(entry) for entry in answer.models]

    def adapters(self) -> list[catalog.AdapterEntry]:
        """Adapters the daemon knows."""
        answer = self._read(CatalogServiceStub, "ListAdapters", catalog_pb2.ListAdaptersRequest())
        return [catalog.adapter_entry(entry) for entry in answer.adapters]

    def presets(self) -> list[catalog.PresetEntry]:
        """Named sets of configuration values."""
        answer = self._read(CatalogServiceStub, "ListPresets", catalog_pb2.ListPresetsRequest())
        return [catalog.preset_entry(entry) for entry in answer.presets]

    def _read(self, stub: type[Any], method: str, request: Any) -> Any:
        """A call that may be repeated freely."""
        return self.connection.unary(stub, method, request, timeout=TIMEOUT, retry=True)


def _config_message(values: Mapping[str, Any]) -> run_pb2.RunConfig:
    """The configuration as it is sent. What a message can't hold is refused as the daemon would refuse it."""
    try:
        return wire_runs.config_to_proto(values)
    except (ValueError, TypeError, AttributeError, ParseError) as fault:
        parse_config(dict(values))
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"the configuration can't be sent: {fault}") from fault
