"""Progress as plain lines, one per event, for logs and pipes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from opd_daemon.cli.progress import RunProgress, measured
from opd_daemon.cli.text import clock, duration, one_line, percent, size
from opd_daemon.types import Event, EventKind, Gauges

SIGN_OF_LIFE_SECONDS = 5.0
SAMPLE_WIDTH = 60


class PlainView:
    """Writes a line per event, and one at least every five seconds while the run lives."""

    def __init__(self, progress: RunProgress, write: Callable[[str], None]) -> None:
        self.progress = progress
        self._write = write
        self._written = time.monotonic()

    def update(self, item: Event | Gauges) -> None:
        """Tell about an item the progress has taken already."""
        if isinstance(item, Event):
            line = event_line(item)
            if item.kind is EventKind.METRICS:
                line += f"  ETA {duration(self.progress.seconds_remaining() or 0)}"
            self.line(f"{clock(item.time)} {line}")
        else:
            self.tick()

    def tick(self) -> None:
        """A sign of life when nothing was written for a while."""
        if time.monotonic() - self._written >= SIGN_OF_LIFE_SECONDS and not self.progress.finished:
            self.line(self._sign_of_life())

    def line(self, text: str) -> None:
        """Write one line."""
        self._write(text)
        self._written = time.monotonic()

    def _sign_of_life(self) -> str:
        progress = self.progress
        remaining = progress.seconds_remaining()
        parts = [f"{progress.state} step {progress.step}/{progress.total_steps}"]
        if memory := progress.gauges.get("active_memory_bytes"):
            parts.append(f"memory {size(memory)}")
        if remaining is not None:
            parts.append(f"ETA {duration(remaining)}")
        return f"{clock(datetime.now(UTC))} … {'  '.join(parts)}"


def event_line(event: Event) -> str:
    """An event in one line, without its time."""
    return _LINES[event.kind](event.payload)


def _run_state(payload: dict[str, Any]) -> str:
    message = f": {one_line(payload['message'], 300)}" if payload.get("message") else ""
    return f"{payload.get('state') or 'state unknown to this version'}{message}"


def _metrics(payload: dict[str, Any]) -> str:
    payload = measured(payload)
    compared = "kl_mean" in payload and (
        f"KL {payload['kl_mean']:.4f}",
        f"agreement {percent(payload['agreement'])}",
        f"top-5 {percent(payload['top5_agreement'])}",
        f"entropy teacher {payload['teacher_entropy']:.3f} student {payload['student_entropy']:.3f}",
    )
    asked = payload["cache_hits"] + payload["cache_misses"]
    parts = (
        f"step {payload['step']}/{payload['total_steps']}",
        *(compared or ()),
        f"loss {payload['loss']:.4f}",
        f"{payload['tokens_per_second']:.0f} tok/s",
        *((f"cache {payload['cache_hits']}/{asked}",) if asked else ()),
        f"memory {size(payload['active_memory_bytes'])}",
    )
    return "  ".join(parts)


def _evaluation(payload: dict[str, Any]) -> str:
    on_teacher = payload.get("on_teacher") or payload
    parts = [
        f"held-out after step {payload['step']}: {_divergences(on_teacher)}",
        f"agreement {percent(payload['agreement'])}",
        f"top-5 {percent(payload['top5_agreement'])}",
        f"entropy teacher {payload['teacher_entropy']:.3f} student {payload['student_entropy']:.3f}",
    ]
    if own := payload.get("on_student"):
        parts.append(f"own samples: {_divergences(own)}  acceptance {percent(own['acceptance'])}")
    parts += [f"{name} {score:.4f}" for name, score in (payload.get("tasks") or {}).items()]
    if payload.get("is_best"):
        parts.append("(best so far)")
    return "  ".join(parts)


def _divergences(comparison: dict[str, Any]) -> str:
    """Both KLs, each with half its 95 % confidence interval where that is known."""
    widths = comparison.get("half_widths") or {}
    shown = []
    for title, name in (("forward KL", "forward_kl"), ("reverse KL", "reverse_kl")):
        spread = f" ± {widths[name]:.4f}" if name in widths else ""
        shown.append(f"{title} {comparison[name]:.4f}{spread}")
    return "  ".join(shown)


def _checkpoint(payload: dict[str, Any]) -> str:
    marks = [name for name, key in (("best", "is_best"), ("final", "is_final")) if payload.get(key)]
    kind = f"{' and '.join(marks)} adapter" if marks else "checkpoint"
    return f"{kind} of step {payload['step']}: {payload['path']} ({size(payload['bytes'])})"


def _log(payload: dict[str, Any]) -> str:
    prefix = "" if payload["level"] == "info" else f"{payload['level']}: "
    return f"{prefix}{one_line(payload['text'], 500)}"


def _sample(payload: dict[str, Any]) -> str:
    prompt, completion = (one_line(payload[name], SAMPLE_WIDTH) for name in ("prompt", "completion"))
    return f"{payload['source']} after step {payload['step']}: {prompt!r} → {completion!r}"


def _teacher(payload: dict[str, Any]) -> str:
    message = f": {one_line(payload['message'], 300)}" if payload.get("message") else ""
    return f"teacher {payload['state']} {payload['name']}{message}"


_LINES: dict[EventKind, Callable[[dict[str, Any]], str]] = {
    EventKind.RUN_STATE: _run_state,
    EventKind.METRICS: _metrics,
    EventKind.EVALUATION: _evaluation,
    EventKind.CHECKPOINT: _checkpoint,
    EventKind.LOG: _log,
    EventKind.SAMPLE: _sample,
    EventKind.TEACHER: _teacher,
}
