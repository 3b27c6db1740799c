"""A run's progress folded from its events, and how it looks."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from opd_daemon.cli.live import LiveView, change, frame, measures
from opd_daemon.cli.plain import PlainView, event_line
from opd_daemon.cli.progress import RunProgress
from opd_daemon.types import Comparison, EvaluationMetrics, Event, EventKind, Gauges, Plan, Run, RunState, StepMetrics

START = datetime(2026, 1, 1, tzinfo=UTC)
RUN = Run(
    "distill_20260101_000000",
    RunState.PENDING,
    {"num_steps": 10, "divergence": "reverse_kl", "base_model_path": "/m"},
    START,
    total_steps=10,
    plan=Plan(100.0, 1, 2, 3, 4),
)


def metrics(step: int, **values: float) -> dict[str, Any]:
    fields = dict.fromkeys(StepMetrics.__dataclass_fields__, 1.0)
    counts = {"cache_hits": 3, "cache_misses": 1, "active_memory_bytes": 2 * 10**9, "peak_memory_bytes": 3 * 10**9}
    return asdict(
        StepMetrics(**{**fields, **counts, "step": step, "total_steps": 10, "seconds_remaining": 50.0, **values})
    )


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    names = [name for name, kind in EvaluationMetrics.__annotations__.items() if kind == "float"]
    fields: dict[str, Any] = {**dict.fromkeys(names, 1.0), "exact": True, "tokens": 40, "samples": 4}
    return asdict(EvaluationMetrics(**{**fields, "step": step, **values}))


def comparison(reverse_kl: float, **values: Any) -> Comparison:
    names = [name for name, kind in Comparison.__annotations__.items() if kind == "float"]
    fields: dict[str, Any] = {**dict.fromkeys(names, 0.5), "tokens": 40, "samples": 4}
    return Comparison(**{**fields, "reverse_kl": reverse_kl, **values})


def event(kind: EventKind, payload: dict[str, Any], seconds: float = 0.0, revision: int = 1) -> Event:
    return Event(kind, RUN.run_id, payload, START + timedelta(seconds=seconds), revision)


def state(name: str, attempt: int = 0, seconds: float = 0.0, message: str = "") -> Event:
    payload = {"state": name, "previous": None, "message": message, "error_reason": "", "attempt": attempt}
    return event(EventKind.RUN_STATE, payload, seconds)


def after(*events: Event | Gauges, run: Run = RUN) -> RunProgress:
    progress = RunProgress.of(run)
    for item in events:
        progress.take(item)
    return progress


def test_before_the_first_step_the_eta_is_the_plans() -> None:
    assert after().seconds_remaining(START) == 100.0
    progress = after(state("PLANNING", seconds=5))
    assert progress.seconds_remaining(START + timedelta(seconds=25)) == pytest.approx(80.0)


def test_after_a_step_the_eta_is_measured_and_counts_down() -> None:
    progress = after(state("RUNNING"), event(EventKind.METRICS, metrics(1), seconds=10))
    assert progress.seconds_remaining(START + timedelta(seconds=30)) == pytest.approx(30.0)
    assert progress.seconds_remaining(START + timedelta(seconds=300)) == 0.0


def test_a_resting_run_has_no_eta() -> None:
    assert after(state("SUCCEEDED")).seconds_remaining() is None


def test_what_a_step_did_not_measure_is_not_shown() -> None:
    unasked = metrics(1, compared_tokens=0, cache_hits=0, cache_misses=0, agreement=0.0, kl_mean=0.0)
    written = event_line(event(EventKind.METRICS, unasked))
    assert "loss 1.0000" in written
    assert not any(word in written for word in ("KL", "agreement", "teacher", "cache"))
    assert "KL 1.0000  agreement" in event_line(event(EventKind.METRICS, metrics(1)))
    told_nothing = {name: value for name, value in metrics(1).items() if name != "compared_tokens"}
    assert "KL 1.0000" in event_line(event(EventKind.METRICS, told_nothing))
    progress = after(event(EventKind.METRICS, unasked))
    assert "agreement" not in progress.metrics


def test_cache_hits_add_up_and_the_first_step_is_kept_for_comparison() -> None:
    steps = [event(EventKind.METRICS, metrics(step, loss=10.0 - step)) for step in (1, 2, 3)]
    progress = after(*steps)
    assert (progress.cache_hits, progress.cache_misses) == (9, 3)
    assert (progress.first["loss"], progress.metrics["loss"]) == (9.0, 7.0)
    assert progress.fraction == pytest.approx(0.3)


def test_the_rest_of_an_earlier_attempt_is_not_the_end() -> None:
    resumed = replace(RUN, attempt=1)
    progress = after(state("STOPPED"), run=resumed)
    assert not progress.finished
    progress.take(state("PENDING", attempt=1))
    progress.take(state("SUCCEEDED", attempt=1))
    assert progress.finished


def test_events_of_other_runs_change_nothing() -> None:
    progress = after(replace(state("FAILED"), run_id="other"))
    assert progress.state is RunState.PENDING


def test_a_repeated_evaluation_after_a_resume_replaces_the_old_one() -> None:
    progress = after(*(event(EventKind.EVALUATION, evaluation(step)) for step in (0, 5, 10, 5)))
    assert [entry["step"] for entry in progress.evaluations] == [0, 5]


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 20), (40, 24), (200, 60)])
def test_the_live_view_fits_its_terminal(width: int, height: int) -> None:
    logs = [event(EventKind.LOG, {"level": "warning", "text": "long " * 60}) for _ in range(40)]
    progress = after(
        state("RUNNING"),
        event(EventKind.EVALUATION, evaluation(0, on_student=comparison(3.25))),
        event(EventKind.METRICS, metrics(1, reverse_kl=2.0)),
        event(EventKind.METRICS, metrics(2, reverse_kl=1.5)),
        *logs,
    )
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(frame(progress, width, height))
    lines = console.export_text().rstrip("\n").split("\n")
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    text = "\n".join(lines)
    for word in ("RUNNING", "2/10", "20 %", "ETA", "reverse KL", "agreement", "student entropy"):
        assert word in text
    assert ("3.250" in text) == (height >= 24)
    if width >= 60:
        assert "↓ 0.500" in text
        assert "6 hits, 2 misses" in text


def test_arrows_say_direction_and_colours_say_improvement() -> None:
    by_name = {measure.name: measure for measure in measures("reverse_kl")}
    assert (change(by_name["reverse_kl"], 1.0, 2.0).plain, change(by_name["reverse_kl"], 1.0, 2.0).style) == (
        "↓ 1.000",
        "green",
    )
    assert change(by_name["reverse_kl"], 3.0, 2.0).style == "red"
    assert change(by_name["agreement"], 0.6, 0.4).plain == "↑ 20.0"
    assert change(by_name["agreement"], 0.6, 0.4).style == "green"
    assert change(by_name["student_entropy"], 0.6, 0.4).style == "dim"
    assert change(by_name["loss"], 1.0, 1.0).plain == ""


def test_the_live_view_draws_a_last_frame_when_it_is_closed() -> None:
    console = Console(width=80, height=30, force_terminal=True, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    progress = after(state("RUNNING"))
    with console.file, LiveView(progress, console) as view:
        view.line("a word from the command")
        progress.take(state("SUCCEEDED"))
    assert "SUCCEEDED" in console.export_text()


EVENTS = [
    (state("FAILED", message="out of\nmemory"), "FAILED: out of memory"),
    (event(EventKind.METRICS, metrics(3)), "step 3/10  KL 1.0000  agreement 100.0 %"),
    (event(EventKind.EVALUATION, evaluation(5)), "held-out after step 5: forward KL 1.0000  reverse KL 1.0000"),
    (
        event(
            EventKind.EVALUATION,
            evaluation(
                5,
                on_teacher=comparison(0.75, half_widths={"forward_kl": 0.02, "reverse_kl": 0.03}),
                on_student=comparison(0.25),
                tasks={"arc_easy": 0.625},
                is_best=True,
            ),
        ),
        (
            "held-out after step 5: forward KL 0.5000 ± 0.0200  reverse KL 0.7500 ± 0.0300  agreement 100.0 %  "
            "top-5 100.0 %  entropy teacher 1.000 student 1.000  own samples: forward KL 0.5000  reverse KL 0.2500  "
            "acceptance 50.0 %  arc_easy 0.6250  (best so far)"
        ),
    ),
    (event(EventKind.LOG, {"level": "warning", "text": "\x1b[31mred"}), "warning: [31mred"),
    (
        event(EventKind.SAMPLE, {"step": 2, "prompt": "why?", "completion": "so\nbe it", "source": "student"}),
        "student after step 2: 'why?' → 'so be it'",
    ),
    (
        event(
            EventKind.CHECKPOINT,
            {"step": 4, "path": "/c", "bytes": 5_200_000, "is_best": True, "is_final": False, "validation_kl": 1.0},
        ),
        "best adapter of step 4: /c (5.2 MB)",
    ),
    (event(EventKind.TEACHER, {"state": "READY", "digest": "d", "name": "qwen", "message": ""}), "teacher READY qwen"),
]


@pytest.mark.parametrize(("item", "line"), EVENTS)
def test_every_event_is_one_plain_line(item: Event, line: str) -> None:
    written = event_line(item)
    assert written.startswith(line)
    assert written.isprintable()


def test_there_is_a_line_for_every_kind() -> None:
    assert {item.kind for item, _ in EVENTS} == set(EventKind)


def test_a_quiet_run_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    progress = after(state("RUNNING"))
    view = PlainView(progress, lines.append)
    view.tick()
    assert lines == []
    monkeypatch.setattr("opd_daemon.cli.plain.SIGN_OF_LIFE_SECONDS", 0.0)
    progress.take(Gauges(RUN.run_id, START, {"active_memory_bytes": 3e9}))
    view.tick()
    assert "RUNNING step 0/10  memory 3.0 GB  ETA" in lines[0]
    progress.take(state("SUCCEEDED"))
    view.tick()
    assert len(lines) == 1
