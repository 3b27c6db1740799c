"""Measures this machine with models of a run's shapes, few layers and random weights; a process of its own.

`python -m opd_daemon.runs.measurement` reads a configuration from standard input and prints `MeasuredRates` as JSON.
It trains a few steps with the parts every trainer is made of, in the run's own session, with a teacher in this process:
so it measures what the run will do, whatever that is made of.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import psutil

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill import Prompt, Rollout, backward, micro_batches, sample_completions, score, teacher_completions
from opd_daemon.distill.batches import pad
from opd_daemon.distill.machines import this_machine
from opd_daemon.distill.rates import MeasuredRates, Pair, features, fit
from opd_daemon.distill.session import run_trainer
from opd_daemon.distill.shape import adapter_parameters, in_float32, shape_of
from opd_daemon.distill.workload import Decode, Forward, Item, Kind, Update
from opd_daemon.home import Home
from opd_daemon.models.folder import ModelFolder, read_folder
from opd_daemon.models.stand_in import write_stand_in
from opd_daemon.plugins import PluginRegistry
from opd_daemon.teacher import TeacherService
from opd_daemon.trainer import TeacherHead, TrainContext, TrainerInfo
from opd_daemon.types import (
    CachedScores,
    EventKind,
    GeneratedToken,
    GenerateRequest,
    ScoreRequest,
    TeacherInfo,
)

T = TypeVar("T")

# The larger of the two stand-ins has so many layers, as long as they take no more than so many bytes; the smaller has a
# third of them. A single layer would stay in the processor's cache, and the next one would then seem to cost too much.
MOST_LAYERS = 9
LAYERS_BYTES = 1 << 29
SMALLER = 3

# Points are measured again until they have taken so long, and the mean counts, as a run's time is a sum too. The very
# first time finds nothing warm and doesn't count. No further points are tried after the budget.
ENOUGH_SECONDS = 0.7
MOST_REPEATS = 5
BUDGET_SECONDS = 20.0
EVALUATED_PROMPTS, EVALUATED_TOKENS = 2, 4
HASHED_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Point:
    """Sequences of `prompt` and `tokens` tokens, sampled, written by the teacher too, and trained on together."""

    sequences: int
    prompt: int
    tokens: int


# The largest first: what follows reuses its memory, as in a run every step does.
POINTS = (
    Point(8, 64, 8),
    Point(24, 16, 8),
    Point(4, 16, 20),
    Point(2, 64, 4),
    Point(2, 16, 16),
)


@dataclass(slots=True)
class Samples:
    """Measured seconds and what was done in them, by kind of work."""

    rows: dict[Kind, list[list[float]]] = field(default_factory=dict)
    seconds: dict[Kind, list[float]] = field(default_factory=dict)

    def add(self, kind: Kind, item: Item, pair: Pair, seconds: float) -> None:
        """One measurement."""
        self.rows.setdefault(kind, []).append(features(kind, item, pair))
        self.seconds.setdefault(kind, []).append(seconds)

    def weights(self) -> dict[Kind, list[float]]:
        """The fit to all of them."""
        return {kind: fit(rows, self.seconds[kind]) for kind, rows in self.rows.items()}


class _Measured(Exception):
    """Everything is measured; the session needs no end."""


class Silence:
    """A reporter nobody listens to."""

    def started(self) -> None:
        """Nothing to tell."""

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        """Nothing to tell."""

    def gauges(self, values: dict[str, float]) -> None:
        """Nothing to tell."""

    def settle(self) -> None:
        """Nothing to store."""


class TeacherHere:
    """The teacher service of a daemon in this process, behind the interface a worker has of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._service = TeacherService(folder / "cache", folder / "digests.json", cache_limit_bytes=1 << 30)
        self._wait(self._service.start())
        self._wait(_drained(self._service.load(str(model))))

    def close(self) -> None:
        """Let the service go."""
        self._wait(self._service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def info(self) -> TeacherInfo:
        """Facts of the loaded teacher."""
        info = self._service.info
        if info is None:
            raise AssertionError("loaded in the constructor")
        return info

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        """As `trainer.Teacher.score`."""
        found = dict(self._wait(_collected(lambda: self._service.score(requests))))
        return [found[place] for place in range(len(requests))]

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
        """As `trainer.Teacher.generate`."""
        found: list[list[GeneratedToken]] = [[] for _ in requests]
        for place, token in self._wait(_collected(lambda: self._service.generate(requests))):
            found[place].append(token)
        return found

    def head(self) -> TeacherHead:
        """As `trainer.Teacher.head`."""
        return self._wait(self._service.head())

    def unload(self) -> None:
        """As `trainer.Teacher.unload`."""
        self._wait(self._service.unload())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _collected(items: Callable[[], AsyncIterator[T]]) -> list[T]:
    return [item async for item in items()]


async def _drained(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


@dataclass(slots=True)
class Measurer:
    """A trainer that trains on made-up sequences and writes down how long each part takes. began: when it began."""

    pair: Pair
    samples: Samples
    began: float = 0.0

    def train(self, context: TrainContext) -> None:
        """As `trainer.Trainer.train`; ends the session when it has measured everything."""
        self.began = time.perf_counter()
        steps = iter(context.loop)
        step = next(steps)
        began = time.perf_counter()
        for number, point in enumerate(POINTS):
            tries: list[list[tuple[Kind, Item, float]]] = []
            started = time.perf_counter()
            while len(tries) < MOST_REPEATS and (
                len(tries) < 1 + (number == 0) or time.perf_counter() - started < ENOUGH_SECONDS
            ):
                found = self._try(context, step, point, np.random.default_rng([number, len(tries)]))
                updating = time.perf_counter()
                step.update()
                step = next(steps)
                tries.append([*found, ("update", Update(1), time.perf_counter() - updating)])
            for same in zip(*tries[number == 0 :], strict=True):
                kind, item, _ = same[0]
                self.samples.add(kind, item, self.pair, statistics.fmean(seconds for _, _, seconds in same))
            self._compare(context, point)
            if time.perf_counter() - began > BUDGET_SECONDS:
                break
        raise _Measured

    def _try(
        self, context: TrainContext, step: Any, point: Point, drawn: np.random.Generator
    ) -> list[tuple[Kind, Item, float]]:
        config = context.config
        prompts = list(_prompts(context, point, drawn))
        decode = Decode(point.sequences, point.prompt, point.tokens, point.sequences)
        clock = time.perf_counter
        started = clock()
        rollouts = sample_completions(
            context.student,
            prompts,
            max_tokens=point.tokens,
            temperature=config.generation_temperature,
            seed=int(drawn.integers(1 << 30)),
            support=config.top_k if config.signal == "sparse" and config.support != "teacher" else 0,
        )
        sampled = clock()
        step.log_rollouts(rollouts)
        scoring = clock()
        targets = score(context, rollouts)
        scored = clock()
        length = point.prompt + point.tokens
        rows = float(sum(len(rollout.completion_ids) for rollout in rollouts))
        found: list[tuple[Kind, Item, float]] = [
            ("sample", decode, sampled - started),
            ("score", Forward(point.sequences, length, rows), scored - scoring),
        ]
        for batch in micro_batches(context, rollouts, targets, labels="teacher"):
            learning = clock()
            step.accumulate(backward(context, batch))
            found.append(("learn", Forward(batch.tokens.shape[0], batch.tokens.shape[1], rows), clock() - learning))
        writing = clock()
        teacher_completions(context.teacher, prompts, max_tokens=point.tokens, temperature=1.0, seed=1)
        return [*found, ("write", decode, clock() - writing)]

    def _compare(self, context: TrainContext, point: Point) -> None:
        """Compare the models on made-up completions, once what the teacher says of them is at hand."""
        drawn = np.random.default_rng(0)
        rollouts = [
            Rollout(prompt, prompt.token_ids[: point.tokens], "length", "data")
            for prompt in _prompts(context, point, drawn)
        ]
        tokenwise = context.loop.evaluator.tokenwise
        tokenwise.compare(rollouts, keep=True)
        started = time.perf_counter()
        tokenwise.compare(rollouts, keep=True)
        seconds = time.perf_counter() - started
        sequences, length = pad(rollouts)[0].shape
        self.samples.add("compare", Forward(sequences, length, sequences * point.tokens), self.pair, seconds)


def _prompts(context: TrainContext, point: Point, drawn: np.random.Generator) -> Iterator[Prompt]:
    ids = np.setdiff1d(np.arange(context.student.vocab_size), context.student.eos_ids)
    for place in range(point.sequences):
        yield Prompt(place, "", tuple(int(token) for token in drawn.choice(ids, point.prompt)))


def measure(config: RunConfig) -> MeasuredRates:
    """Rates of this machine for a run's models."""
    imported = time.time() - psutil.Process().create_time()
    machine = this_machine()
    models = [read_folder(Path(path)) for path in (config.base_model_path, config.teacher_model_path)]
    samples, loading = Samples(), 0.0
    for counts in dict.fromkeys(zip(*map(_layers, models), strict=True)):
        with TemporaryDirectory(prefix="opd-measurement-") as name:
            folder = Path(name)
            roles = zip(models, ("student", "teacher"), counts, strict=True)
            student, teacher = (
                read_folder(write_stand_in(model, folder / role, count)) for model, role, count in roles
            )
            seconds = _run(config, Measurer(_pair(config, machine.float32, student, teacher), samples), folder)
            # The first load also imports what every worker imports.
            loading = loading or seconds
    return MeasuredRates(samples.weights(), imported + loading, machine.disk, _hash_rate())


def _run(config: RunConfig, measurer: Measurer, folder: Path) -> float:
    """Measure in a session like a run's; the seconds until its training begins."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(8)))
    changed = {
        "run_id": "measurement",
        "base_model_path": str(folder / "student"),
        "teacher_model_path": str(folder / "teacher"),
        "student_adapter_path": "",
        "output_adapter_path": "",
        "prompts_path": str(prompts),
        "validation_prompts_path": "",
        "trainer_options": {},
        "num_steps": 1000,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
        "batch_size": max(point.sequences for point in POINTS),
        "gradient_accumulation_steps": 1,
        "max_batch_tokens": 0,
        "max_generation_tokens": EVALUATED_TOKENS,
        "max_validation_prompts": EVALUATED_PROMPTS,
        "validation_fraction": 0.5,
        "max_eval_samples": 0,
        "eval_tasks": "",
        "teacher_system_prompt": "",
        "precompute": False,
    }
    teacher = TeacherHere(folder, folder / "teacher")
    started = time.perf_counter()
    try:
        run_trainer(
            run_id="measurement",
            config=config.model_copy(update=changed),
            trainer=TrainerInfo("measurement", "1", "", factory=lambda: measurer, on_policy=True),
            folders=Home(folder / "home").run("measurement"),
            teacher=teacher,
            reporter=Silence(),
            should_stop=lambda: False,
            resume_from=None,
            divergences=PluginRegistry.discover().divergences,
        )
    except _Measured:
        return measurer.began - started
    finally:
        teacher.close()
    raise AssertionError("the measurement ends its session")


def _layers(folder: ModelFolder) -> tuple[int, int]:
    """Layers of the smaller and of the larger stand-in."""
    shape = shape_of(folder)
    larger = min(shape.layers, MOST_LAYERS, max(2, LAYERS_BYTES // max(1, shape.block_bytes)))
    return (max(1, larger // SMALLER), larger)


def _pair(config: RunConfig, float32: bool, student: ModelFolder, teacher: ModelFolder) -> Pair:
    cast = float32 or not config.mixed_precision
    shape = shape_of(in_float32(student) if cast else student)
    adapter = adapter_parameters(student, config.lora)
    return Pair(shape, shape_of(teacher), student.weight_bytes, adapter, shape.layers, config.signal == "exact")


def _hash_rate() -> float:
    block = bytes(HASHED_BYTES)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    return HASHED_BYTES / (time.perf_counter() - started)


def main() -> None:
    """Read the configuration, measure, print."""
    config = parse_config(json.load(sys.stdin))
    print(json.dumps(measure(config).to_json()))  # noqa: T201 - the answer to the process that asked


if __name__ == "__main__":
    main()
