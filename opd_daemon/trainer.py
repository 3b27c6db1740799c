"""What authors of trainers see: how a trainer is described, what it is given, what it may report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from opd_daemon.config import RunConfig
from opd_daemon.home import RunFolders
from opd_daemon.types import CachedScores, EventKind, GeneratedToken, GenerateRequest, ScoreRequest, TeacherInfo

if TYPE_CHECKING:
    from opd_daemon.distill.data import PromptSet
    from opd_daemon.distill.loop import TrainingLoop
    from opd_daemon.distill.objective import Objective
    from opd_daemon.distill.student import Student


class NoOptions(BaseModel):
    """Options of a trainer that has none of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def from_the_student(_config: RunConfig, _options: BaseModel) -> Mapping[str, float]:
    """Every completion is the student's own."""
    return {"student": 1.0}


def no_faults(_config: RunConfig, _options: BaseModel) -> Iterable[tuple[str, str]]:
    """Any configuration will do."""
    return ()


class Trainer(Protocol):
    """A training method. `train` runs in a worker process and returns when the run is complete or was asked to stop."""

    def train(self, context: TrainContext) -> None:
        """Train `context.student` until `context.loop` ends."""
        ...


@dataclass(frozen=True, slots=True)
class TrainerInfo:
    """A trainer as plugins register it. `factory` is called in the worker only, so it may import heavy modules.

    on_policy: it trains on the student's own samples, so the best checkpoint is chosen on such; else it trains on
    completions that don't depend on the student. uses_teacher: false for one that never asks the teacher to score.
    sources: who writes the completions under a configuration, "student", "teacher" or "data", and the share of each.
    faults: pairs of a configuration's field and what is wrong with it together with the options. Both are called in
    the daemon, before anything loads.
    """

    name: str
    version: str
    summary: str
    factory: Callable[[], Trainer]
    options: type[BaseModel] = NoOptions
    on_policy: bool = False
    uses_teacher: bool = True
    sources: Callable[[RunConfig, BaseModel], Mapping[str, float]] = from_the_student
    faults: Callable[[RunConfig, BaseModel], Iterable[tuple[str, str]]] = no_faults


BUILT_IN_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
"""Names that no plugin can take; `opd_daemon.distill.registry` describes them."""


@dataclass(frozen=True, slots=True)
class DivergenceInfo:
    """A divergence as plugins register it.

    `factory(options, temperature)` returns an `opd_daemon.distill.Divergence` at that temperature. It is called in the
    worker only, so it may import heavy modules. signals: of "exact", "sparse", "sampled", those it can be had from.
    """

    name: str
    summary: str
    factory: Callable[..., Any]
    options: type[BaseModel] = NoOptions
    signals: tuple[str, ...] = ("exact", "sparse")


class RunRefused(Exception):
    """Raised by `opd_before_run_started` to refuse a run; the text is shown to the person who asked for it."""


class Teacher(Protocol):
    """The resident teacher, from a worker's point of view. Calls block until the daemon has answered."""

    @property
    def info(self) -> TeacherInfo:
        """Facts of the loaded teacher."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        """Score token sequences; one result per request, in order."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
        """Let the teacher continue prompts; one completion per request, in order."""
        ...

    def head(self) -> TeacherHead:
        """The teacher's output head, fetched once. Raises HIDDEN_NOT_SUPPORTED where it can't be split off."""
        ...

    def unload(self) -> None:
        """Free the teacher's memory; the cache answers from then on. Raises TEACHER_IN_USE if another run needs it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TeacherHead:
    """Weights that turn hidden states into logits, exactly as the teacher holds them.

    tensors: name → numpy array (bfloat16 as uint16 bit patterns, see `dtypes`): `weight` (V, D) and, where quantised,
    `scales`, `biases`; optional `bias` (V,). group_size and bits are 0 when the head is not quantised. logits are
    logit_scale · z, or soft_cap · tanh(logit_scale · z / soft_cap) where soft_cap is not 0.
    """

    tensors: dict[str, Any]
    dtypes: dict[str, str]
    group_size: int = 0
    bits: int = 0
    mode: str = "affine"
    logit_scale: float = 1.0
    soft_cap: float = 0.0


class Reporter(Protocol):
    """Where a run's events go."""

    def started(self) -> None:
        """The student is loaded and training begins."""
        ...

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        """Report a durable event; returns once it is on its way, in order."""
        ...

    def gauges(self, values: dict[str, float]) -> None:
        """Report readings of which only the latest matters."""
        ...

    def settle(self) -> None:
        """Return once every event so far is stored."""
        ...


@dataclass(slots=True)
class TrainContext:
    """Everything a trainer needs.

    `loop` yields the steps still to do and takes care of schedule, accumulation, clipping, evaluation, checkpoints,
    metrics and stopping, so a trainer only says what one step does. `objective` is the loss the configuration asks for.
    `micro_batch_size`: most sequences in a micro-batch; less than `config.batch_size` after memory ran out.
    """

    run_id: str
    config: RunConfig
    options: BaseModel
    folders: RunFolders
    teacher: Teacher
    student: Student
    prompts: PromptSet
    objective: Objective
    loop: TrainingLoop
    reporter: Reporter
    should_stop: Callable[[], bool]
    resume_from: Path | None = None
    masked_token_ids: tuple[int, ...] = field(default=())
    memory_halvings: int = 0

    @property
    def micro_batch_size(self) -> int:
        """Most sequences in a micro-batch."""
        return max(1, self.config.batch_size >> self.memory_halvings)
