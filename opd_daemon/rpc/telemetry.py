"""The daemon's figures in Prometheus' text format, gathered when somebody asks and at no other time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

import opd_daemon
from opd_daemon.rpc.meter import BUCKETS, CallTally
from opd_daemon.types import RunState, TeacherState

if TYPE_CHECKING:
    from opd_daemon.rpc.assembly import Daemon
    from opd_daemon.types import Event

WATCH = "/opd_daemon.v1.RunService/WatchEvents"


class Telemetry:
    """Figures of one daemon, in a registry of its own: two daemons in a process don't share any."""

    def __init__(self, daemon: Daemon, calls: CallTally) -> None:
        self._daemon = daemon
        self._calls = calls
        self._events: Counter[str] = Counter()
        daemon.events.add_listener(self._count_events)

    def _count_events(self, events: Sequence[Event]) -> None:
        for event in events:
            self._events[event.kind] += 1

    async def text(self) -> bytes:
        """All figures as Prometheus reads them (text format 0.0.4). Raises what reading the store raises."""
        runs = await self._daemon.events.read(lambda store: store.count_runs())
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Gathered([*self._call_figures(), *self._teacher_figures(), *self._daemon_figures(runs)]))
        return generate_latest(registry)

    def _call_figures(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "opd_rpc_requests", "Calls that have ended, by method and gRPC code.", labels=["method", "code"]
        )
        seconds = HistogramMetricFamily(
            "opd_rpc_duration_seconds", "How long calls took, the waiting included.", labels=["method"]
        )
        under_way = GaugeMetricFamily("opd_rpc_under_way", "Calls that have not ended yet.", labels=["method"])
        for method, tally in sorted(self._calls.methods.items()):
            for code, count in sorted(tally.by_code.items()):
                requests.add_metric([method, code], count)
            seconds.add_metric([method], _cumulative(tally.buckets), tally.seconds)
            under_way.add_metric([method], tally.under_way)
        yield from (requests, seconds, under_way)
        yield GaugeMetricFamily("opd_watchers", "Clients that follow the event log.", self._calls.of(WATCH).under_way)

    def _teacher_figures(self) -> Iterator[Metric]:
        service = self._daemon.teacher.service
        work, memory, cache = service.work, service.memory(), service.cache_stats()
        states = {str(state): float(state is service.state) for state in TeacherState}
        yield _gauge("opd_teacher_state", "1 for the state the teacher is in.", states, "state")
        for figure in (
            _Figure("opd_teacher_queue_tokens", "Tokens that wait for the teacher.", service.queued_tokens),
            _Figure("opd_teacher_batch_sequences", "Sequences in the newest batch.", work.newest_batch),
            _Figure("opd_teacher_batches_total", "Batches scored.", work.batches),
            _Figure("opd_teacher_scored_sequences_total", "Sequences scored.", work.scored_sequences),
            _Figure("opd_teacher_scored_tokens_total", "Tokens of the sequences scored.", work.scored_tokens),
            _Figure("opd_teacher_generated_tokens_total", "Tokens generated.", work.generated_tokens),
            _Figure("opd_cache_hits_total", "Teacher results found in the cache.", cache.hits),
            _Figure("opd_cache_misses_total", "Teacher results looked for and not found.", cache.misses),
            _Figure("opd_cache_evicted_total", "Entries removed to keep the limit.", cache.evicted),
            _Figure("opd_cache_corrupt_total", "Entries that failed a check and were dropped.", cache.corrupt),
            _Figure("opd_cache_entries", "Entries in the cache.", cache.entries),
            _Figure("opd_cache_bytes", "Size of the cache on disk.", cache.bytes),
            _Figure("opd_cache_limit_bytes", "Size the cache may grow to.", cache.limit_bytes),
            _Figure("opd_mlx_active_bytes", "Memory of MLX's live arrays; 0 before a model.", memory.active),
            _Figure("opd_mlx_cached_bytes", "Freed memory that MLX keeps for reuse.", memory.cached),
            _Figure("opd_mlx_peak_bytes", "Most memory MLX's arrays have taken.", memory.peak),
        ):
            yield figure.metric()

    def _daemon_figures(self, runs: Mapping[RunState, int]) -> Iterator[Metric]:
        states = {str(state): float(runs.get(state, 0)) for state in RunState}
        yield _gauge("opd_runs", "Runs in the store, by state.", states, "state")
        events = CounterMetricFamily("opd_events", "Events stored since the start, by kind.", labels=["kind"])
        for kind, count in sorted(self._events.items()):
            events.add_metric([kind], count)
        yield events
        build = {"version": opd_daemon.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
        yield _info("opd_build", "What serves here.", build)
        process = psutil.Process()
        with process.oneshot():
            memory, cpu, created = process.memory_info(), process.cpu_times(), process.create_time()
        for figure in (
            _Figure("opd_workers", "Worker processes that live.", self._daemon.workers.count),
            _Figure("opd_process_resident_memory_bytes", "Memory of the daemon's process.", memory.rss),
            _Figure("opd_process_cpu_seconds_total", "CPU time of the daemon's process.", cpu.user + cpu.system),
            _Figure("opd_process_start_time_seconds", "When the daemon started, in Unix time.", created),
        ):
            yield figure.metric()


@dataclass(frozen=True, slots=True)
class _Figure:
    """One number without labels; a name that ends in `_total` makes it a counter."""

    name: str
    help: str
    value: float

    def metric(self) -> Metric:
        if self.name.endswith("_total"):
            return CounterMetricFamily(self.name, self.help, self.value)
        return GaugeMetricFamily(self.name, self.help, self.value)


class _Gathered:
    """What was gathered for one answer, as a registry takes it."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _cumulative(buckets: Sequence[int]) -> list[tuple[str, float]]:
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=True):
        total += count
        found.append((bound, total))
    return found


def _gauge(name: str, text: str, values: Mapping[str, float], label: str) -> Metric:

    metric = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        metric.add_metric([key], value)
    return metric


def _info(name: str, text: str, facts: dict[str, str]) -> Metric:

    return InfoMetricFamily(name, text, facts)
