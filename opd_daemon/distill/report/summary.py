"""The words and tables of a report: what improved, what was planned, what it took, how it was set."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

import psutil
from pydantic import BaseModel

from opd_daemon.config import RunConfig
from opd_daemon.distill.report.measures import (
    BY_NAME,
    Change,
    Estimate,
    Measure,
    changes,
    compared_on,
    criterion_of,
)
from opd_daemon.distill.report.record import RunRecord, number, series, total
from opd_daemon.distill.report.resources import PHASES
from opd_daemon.readable import duration, percent, size
from opd_daemon.types import RunState

CARDS = ("reverse_kl", "forward_kl", "agreement", "acceptance")
PACKAGES = ("opd-daemon", "mlx", "mlx-lm", "numpy", "transformers")

CONFIG_GROUPS = (
    ("Models", ("base_model_path", "teacher_model_path", "student_adapter_path", "output_adapter_path", "lora")),
    ("Data", ("prompts", "validation", "max_prompt", "max_valid")),
    (
        "Objective",
        ("trainer", "divergence", "signal", "support", "top_", "exact_", "loss_", "temperature", "kl_", "ce_"),
    ),
    ("Generation", ("use_teacher_targets", "max_generation", "generation_", "teacher_t", "teacher_s", "seed")),
    ("Training", ("",)),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A table of measures before and after, with what was compared."""

    title: str
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Fact:
    """A named value. strong: it is not what it would be by default."""

    name: str
    value: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """A part of the plan and what came of it, as numbers for a bar and as text; None where one of them is not known."""

    name: str
    planned: float | None
    measured: float | None
    shown: tuple[str, str]

    @property
    def ratio(self) -> str:
        """Measured over planned."""
        if not self.planned or self.measured is None:
            return ""
        ratio = self.measured / self.planned
        return f"× {ratio:.2f}" if ratio < 10 else f"× {ratio:.0f}"


def headline_measure(record: RunRecord) -> Measure:
    """The measure that is closest to what was trained."""
    divergence = str(record.run.config.get("divergence", ""))
    if "forward" in divergence:
        return BY_NAME["forward_kl"]
    return BY_NAME["js_divergence" if divergence.startswith("js") else "reverse_kl"]


def headline_side(record: RunRecord) -> str:
    """Whose completions the best checkpoint was chosen by: those of the "teacher", or of the "student"."""
    criterion = criterion_of(record.after)
    on_own = criterion is not None and criterion[0] == "student"
    return "student" if on_own and compared_on(record.before, "student") else "teacher"


def cards(record: RunRecord) -> list[Change]:
    """The few changes that matter most, the trained divergence first."""
    side, first = headline_side(record), headline_measure(record)
    found = {change.measure.name: change for change in comparison(record, side)}
    names = (first.name, *(name for name in CARDS if name != first.name))
    return [found[name] for name in names if name in found][:4]


def comparison(record: RunRecord, side: str) -> list[Change]:
    """All measures before and after on one side's completions."""
    return changes(compared_on(record.before, side), compared_on(record.after, side))


def comparisons(record: RunRecord) -> Iterator[Comparison]:
    """The tables there are numbers for."""
    for side, whose in (("teacher", "the teacher's completions"), ("student", "the student's own samples")):
        found = comparison(record, side)
        if found:
            after = compared_on(record.after, side) or {}
            yield Comparison(f"On {whose} ({_amount(after)})", found)
    tasks = _tasks(record)
    if tasks:
        yield Comparison("Tasks", tasks)


def _tasks(record: RunRecord) -> list[Change]:
    before, after = ((row or {}).get("tasks") or {} for row in (record.before, record.after))
    found = []
    for name in after:
        first, last = number(before, name), number(after, name)
        if first is not None and last is not None:
            measure = Measure(name, name, "accuracy, %", 1, share=True)
            found.append(Change(measure, Estimate(first), Estimate(last)))
    return found


def _amount(comparison: dict[str, Any]) -> str:
    samples, tokens = number(comparison, "samples"), number(comparison, "tokens")
    prompts = f"{samples:.0f} held-out prompt{'' if samples == 1 else 's'}" if samples else "held-out prompts"
    return f"{prompts}, {tokens:,.0f} tokens" if tokens else prompts


def sentence(record: RunRecord) -> str:
    """What the run achieved."""
    found = cards(record)
    if not found:
        return _progress(record)
    side = headline_side(record)
    whose = "its own samples for" if side == "student" else "the teacher's answers to"
    where = f"On {whose} {_amount(compared_on(record.after, side) or {}).split(',')[0]}"
    first = found[0]
    moved = _moved(first)
    text = f"{where}, the student's {_lower(first.measure.title)} to its teacher {moved}."
    agreement = next((change for change in found if change.measure.name == "agreement"), None)
    if agreement is not None:
        text += f" They {_agreed(agreement)}."
    return text


def _progress(record: RunRecord) -> str:
    done = f"{record.last_step} of {record.run.total_steps} steps"
    return f"{done} were done; there is no evaluation to compare the student with its beginning."


def _moved(change: Change) -> str:
    before, after = change.measure.show(change.before.value), change.measure.show(change.after.value)
    if change.verdict == "same":
        return f"stayed at {after} nats per token"
    share = f" ({_signed(100 * change.difference / change.before.value, 0)} %)" if change.before.value else ""
    verb = "fell" if change.difference < 0 else "rose"
    text = f"{verb} from {before} to {after} nats per token{share}"
    return f"{text}, a difference within noise" if change.certain is False else text


def _agreed(change: Change) -> str:
    before, after = percent(change.before.value), percent(change.after.value)
    text = f"now agree on the next token at {after} of positions, {before} before"
    return f"{text}, a difference within noise" if change.certain is False else text


def difference(change: Change) -> str:
    """The difference as it is shown in tables."""
    points = " points" if change.measure.share else ""
    return f"{_signed(change.measure.factor * change.difference, 1 if change.measure.share else 3)}{points}"


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+"
    return f"{sign}{text}"


def _lower(title: str) -> str:
    return title if title[1:2].isupper() else f"{title[:1].lower()}{title[1:]}"


# What it took


def totals(record: RunRecord) -> Iterator[Fact]:
    """Time, tokens, cache and the like, for the head of the page."""
    run, steps = record.run, record.steps
    seconds = total_seconds(record)
    if seconds:
        yield Fact("time", duration(seconds))
    of_all = f" of {run.total_steps}" if record.last_step != run.total_steps else ""
    yield Fact("steps", f"{record.last_step}{of_all}")
    tokens = total(steps, "tokens")
    if tokens:
        yield Fact("tokens trained on", f"{tokens:,.0f}")
    peak = max(series(steps, "peak_memory_bytes")[1], default=0.0)
    if peak:
        yield Fact("peak memory of arrays", size(peak))
    hits, misses = total(steps, "cache_hits"), total(steps, "cache_misses")
    if hits + misses:
        yield Fact("from the teacher cache", f"{hits:,.0f} of {hits + misses:,.0f}")
    yield from _incidents(record)


def _incidents(record: RunRecord) -> Iterator[Fact]:
    run = record.run
    if run.attempt:
        yield Fact("taken up again", f"{run.attempt} time{'s' if run.attempt > 1 else ''}")
    if run.memory_halvings:
        yield Fact("micro-batch halved, memory", f"{run.memory_halvings} time{'s' if run.memory_halvings > 1 else ''}")
    best = [row for row in record.evaluations if row.get("is_best")]
    if best:
        yield Fact("best checkpoint", f"step {best[-1]['step']}")
    gaps = series(record.steps, "bias_gap")[1]
    if gaps:
        yield Fact("bias of the approximation", f"{_signed(sum(gaps) / len(gaps), 4)} nats")


def total_seconds(record: RunRecord) -> float:
    """Seconds from the start of the worker to the end; of a run that was taken up again, those it has trained."""
    run = record.run
    if run.started_at and run.finished_at and not run.attempt:
        return (run.finished_at - run.started_at).total_seconds()
    return max(max(series(record.steps, "seconds_elapsed")[1], default=0.0), sum(_measured(record).values()))


def _measured(record: RunRecord) -> dict[str, float]:
    """Seconds by phase."""
    seconds = {title: total(record.steps, name) / 1000 for name, title, _ in PHASES}
    return {**seconds, "evaluate": total(record.evaluations, "seconds")}


def planned_times(record: RunRecord) -> list[Planned]:
    """Seconds by phase: planned and measured. The rest is loading, checkpoints, and what lies between the phases."""
    plan, measured, whole = record.run.plan, _measured(record), total_seconds(record)
    planned = dict(plan.phases) if plan else {}
    rows = [
        _seconds(name, planned.get(name), measured[name]) for name in measured if measured[name] or planned.get(name)
    ]
    rest = sum(seconds for name, seconds in planned.items() if name not in measured)
    rows.append(_seconds("the rest", rest or None, max(0.0, whole - sum(measured.values()))))
    rows.append(_seconds("all", plan.seconds if plan else None, whole))
    return rows if plan or whole else []


def _seconds(name: str, planned: float | None, measured: float | None) -> Planned:
    return Planned(name, planned, measured, (_time(planned), _time(measured)))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def planned_sizes(record: RunRecord) -> list[Planned]:
    """Bytes of memory and disk: planned and measured."""
    plan = record.run.plan
    disk = {part.name: part.bytes for part in plan.disk} if plan else {}
    peak = max(series(record.steps, "peak_memory_bytes")[1], default=0.0)
    rows = [
        ("memory, worker's arrays", record.planned_array_bytes, peak or None),
        ("memory, daemon", plan.daemon_peak_bytes if plan else None, None),
        ("disk, checkpoints", disk.get("checkpoints"), record.checkpoint_bytes or None),
    ]
    known = [(name, planned, measured) for name, planned, measured in rows if planned or measured]
    return [
        Planned(name, planned, measured, (size(planned) if planned else "", size(measured) if measured else ""))
        for name, planned, measured in known
    ]


def plan_notes(record: RunRecord) -> list[str]:
    """What the plan assumed and warned of."""
    plan = record.run.plan
    if plan is None:
        return []
    machine = [f"Planned for {plan.machine}."] if plan.machine else []
    return [*machine, *plan.assumptions, *plan.warnings]


def planned_parts(record: RunRecord) -> list[Fact]:
    """The plan's memory by part."""
    plan = record.run.plan
    return [Fact(f"{part.process}: {part.name}", size(part.bytes)) for part in plan.memory] if plan else []


# How it was set


def config_groups(config: dict[str, Any]) -> Iterator[tuple[str, list[Fact]]]:
    """Every setting, in groups; those that differ from the default are strong."""
    left = {name: value for name, value in config.items() if name not in {"run_id", "session_id"}}
    for title, beginnings in CONFIG_GROUPS:
        names = [name for name in left if name.startswith(beginnings)]
        facts = [_setting(name, left.pop(name)) for name in names]
        shown = [fact for fact in facts if fact.value]
        if shown:
            yield title, shown


def _setting(name: str, value: Any) -> Fact:
    known = RunConfig.model_fields.get(name)
    default = known.get_default(call_default_factory=True) if known and not known.is_required() else None
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json")
        value = {**default, **value}
    return Fact(name, _value(value), strong=value != default)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items() if entry not in (None, ""))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def story(record: RunRecord) -> list[Fact]:
    """When the run was made, and how it ended."""
    run = record.run
    facts = [Fact("created", _clock(run.created_at))]
    if run.finished_at:
        facts.append(Fact("finished", _clock(run.finished_at)))
    if run.state is RunState.FAILED and run.error_message:
        facts.append(Fact("why it failed", run.error_message))
    if run.adapter_path:
        facts.append(Fact("adapter", run.adapter_path))
    return facts


def _clock(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")


def environment() -> list[Fact]:
    """The machine and the versions of this process."""
    versions = [Fact(name, version) for name in PACKAGES if (version := _version(name))]
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}"
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    memory = size(psutil.virtual_memory().total)
    return [
        Fact("machine", f"{machine}, {cores} cores, {memory}"),
        Fact("Python", platform.python_version()),
        *versions,
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
