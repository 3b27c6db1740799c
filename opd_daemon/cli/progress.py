"""What is known of a run at this moment, folded from its events. No terminal in here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from opd_daemon.cli.text import clock
from opd_daemon.types import Event, EventKind, Gauges, Run, RunState

KEPT_LOG_LINES = 50

# Means over the tokens at which the models were compared.
COMPARED = frozenset(
    {"kl_mean", "forward_kl", "reverse_kl", "js_divergence", "agreement", "top5_agreement", "teacher_entropy"}
)


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without those that were not measured, as where the teacher was not asked."""
    if metrics.get("compared_tokens") != 0:
        return metrics
    return {name: value for name, value in metrics.items() if name not in COMPARED}


@dataclass(slots=True)
class RunProgress:
    """The run as `GetRun` told it, brought up to date event by event.

    `first` and `baseline` are the first step's metrics and the first evaluation, to which changes refer.
    """

    run: Run
    state: RunState = RunState.PENDING
    step: int = 0
    total_steps: int = 0
    attempt: int = 0
    revision: int = 0
    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    gauges: dict[str, float] = field(default_factory=dict)
    cache_hits: int = 0
    cache_misses: int = 0
    lines: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=KEPT_LOG_LINES))
    _due: datetime | None = None

    @classmethod
    def of(cls, run: Run) -> RunProgress:
        """The state of a run before any event is seen."""
        progress = cls(run, run.state, run.step, run.total_steps, run.attempt)
        progress.total_steps = progress.total_steps or int(run.config.get("num_steps", 0))
        return progress

    @property
    def baseline(self) -> dict[str, Any]:
        """The first evaluation; empty before there is one."""
        return self.evaluations[0] if self.evaluations else {}

    @property
    def evaluation(self) -> dict[str, Any]:
        """The newest evaluation; empty before there is one."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def finished(self) -> bool:
        """Whether the run rests and will stay so: an earlier attempt's rest does not count."""
        return self.state.resting and self.attempt >= self.run.attempt

    @property
    def fraction(self) -> float:
        """Share of the steps that is done."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def seconds_remaining(self, now: datetime | None = None) -> float | None:
        """Time to the end: from measured steps, before those from the plan; None when the run rests or has no plan."""
        if self.state.resting:
            return None
        if self._due is not None:
            return max(0.0, (self._due - (now or datetime.now(UTC))).total_seconds())
        if self.run.seconds_remaining is not None:
            return self.run.seconds_remaining
        return self.run.plan.seconds if self.run.plan else None

    def take(self, item: Event | Gauges) -> None:
        """Bring the state up to date."""
        if isinstance(item, Gauges):
            self.gauges.update(item.values)
            return
        self.revision = max(self.revision, item.revision)
        if item.run_id == self.run.run_id:
            self._fold(item)

    def note(self, text: str, time: datetime | None = None) -> None:
        """Add a line of our own to the log."""
        self.lines.append((clock(time or datetime.now(UTC)), text))

    def _fold(self, event: Event) -> None:
        match event.kind:
            case EventKind.RUN_STATE:
                self._run_state(event)
            case EventKind.METRICS:
                self._metrics(event)
            case EventKind.EVALUATION:
                self._evaluation(event)
            case EventKind.CHECKPOINT:
                self._checkpoint(event)
            case EventKind.LOG:
                level, text = event.payload["level"], event.payload["text"]
                self.note(text if level == "info" else f"{level}: {text}", event.time)
            case EventKind.SAMPLE:
                self.samples.append(event.payload)

    def _run_state(self, event: Event) -> None:
        state = event.payload.get("state")
        if state is None:
            return
        self.state = RunState(state)
        self.attempt = event.payload.get("attempt") or 0
        self.message = event.payload.get("message") or ""
        if self.state is RunState.PENDING:
            self._due = None
        self._expect(event.time, None)
        self.note(f"{self.state}{f': {self.message}' if self.message else ''}", event.time)

    def _metrics(self, event: Event) -> None:
        self.metrics = measured(event.payload)
        self.first = self.first or self.metrics
        self.step, self.total_steps = event.payload["step"], event.payload["total_steps"]
        self.cache_hits += event.payload["cache_hits"]
        self.cache_misses += event.payload["cache_misses"]
        self._expect(event.time, event.payload["seconds_remaining"])

    def _expect(self, time: datetime, measured: float | None) -> None:
        """When the end is due. Before the first step: the plan's time from the moment the run left PENDING."""
        planned = self.run.plan.seconds if self.run.plan and self.state is not RunState.PENDING else None
        seconds = measured if measured is not None else planned
        if seconds is not None and (measured is not None or self._due is None):
            self._due = datetime.fromtimestamp(time.timestamp() + seconds, UTC)

    def _evaluation(self, event: Event) -> None:
        self.evaluations = [entry for entry in self.evaluations if entry["step"] < event.payload["step"]]
        self.evaluations.append(event.payload)

    def _checkpoint(self, event: Event) -> None:
        self.checkpoint = event.payload
        kind = "best adapter" if event.payload.get("is_best") else "checkpoint"
        kind = "final adapter" if event.payload.get("is_final") else kind
        self.note(f"{kind} of step {event.payload['step']} saved", event.time)
