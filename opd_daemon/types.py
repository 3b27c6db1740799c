"""Domain types shared by every room of the house: plain, frozen, no protobuf, no MLX.

Arrays are numpy. The position convention is the same everywhere: row *i* of a result belongs to token *i* of the
sequence and describes the distribution **of** token *i* given the tokens before it, so a sequence of n tokens has
rows 1 … n−1 and there is no "first token" special case. Logprobs are natural logarithms, float32, at temperature 1
unless a temperature is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt

    from opd_daemon.arrays import Float32, Int32

HiddenDtype = Literal["float32", "float16", "bfloat16"]


class TeacherState(StrEnum):
    """Life of the resident teacher."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Facts of a loaded teacher.

    `vocab_size` is the tokenizer's real size; `padded_vocab_size` the width of the logits. Ids between the two exist
    in no tokenizer and are masked before every normalisation.
    """

    name: str
    path: str
    digest: str
    tokenizer_digest: str
    architecture: str
    vocab_size: int
    padded_vocab_size: int
    hidden_size: int
    max_context: int
    weight_bytes: int
    dtype: str
    quantization_bits: int
    supports_hidden: bool
    hidden_refusal: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One report while a teacher loads: `phase` in checking, hashing, loading, warming, ready; fraction in [0, 1]."""

    phase: str
    fraction: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class ScoreWants:
    """What to compute for every scored position, all from one prefill.

    token_stats: logprob and rank of the actual token, entropy of the distribution.
    top_k: that many most likely ids with logprobs, most likely first, and the log of the mass outside them; 0 = none.
    log_z_temperatures: for each T, log Σ_v exp(logprob_v / T), so that logprob_v / T − log_z is the logprob at T.
    hidden: the state after the final norm, in the model's own dtype.
    """

    token_stats: bool = True
    top_k: int = 0
    log_z_temperatures: tuple[float, ...] = ()
    hidden: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest:
    """Score one sequence.

    token_ids (n,) int32; rows score_from … n−1 are scored, 1 ≤ score_from ≤ n−1.
    candidate_ids (rows, C) int32: caller-chosen ids for each scored position, −1 fills unused places.
    masked_token_ids: ids the other model's tokenizer doesn't know; they get no mass.
    """

    token_ids: Int32
    score_from: int
    wants: ScoreWants = field(default_factory=ScoreWants)
    candidate_ids: Int32 | None = None
    masked_token_ids: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Number of scored positions."""
        return len(self.token_ids) - self.score_from


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Results of one `ScoreRequest`; an output that was not asked for is None.

    token_logprobs, ranks (0 = most likely), entropies (nats): (rows,)
    top_ids, top_logprobs: (rows, k); top_tail: (rows,) log of the mass outside the top k (−inf when nothing is left)
    candidate_logprobs: (rows, C), −inf at unused places; candidate_tail: (rows,) log of the mass outside the candidates
    log_z: (rows, number of temperatures)
    hidden: (rows, hidden_size) in hidden_dtype; bfloat16 travels as uint16 bit patterns
    """

    token_logprobs: Float32 | None = None
    ranks: Int32 | None = None
    entropies: Float32 | None = None
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None
    top_tail: Float32 | None = None
    candidate_logprobs: Float32 | None = None
    candidate_tail: Float32 | None = None
    log_z: Float32 | None = None
    hidden: npt.NDArray[Any] | None = None
    hidden_dtype: HiddenDtype = "float32"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The outputs that are present, by name."""
        names = (entry.name for entry in fields(self) if entry.name != "hidden_dtype")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class CachedScores:
    """Scores with their origin: `cached` is true when no model computed them for this call."""

    scores: Scores
    cached: bool
    milliseconds: float


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue one prompt.

    temperature 0 is greedy. A seed makes sampling repeatable. top_logprobs is the number of alternatives returned
    with each token. Generation ends at any EOS id of the model, any of stop_token_ids, or max_tokens.
    masked_token_ids: never generated.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    masked_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedToken:
    """One generated token; its logprob is the model's own, before temperature and top_p.

    finish_reason is empty except on the last token: "stop" or "length". cached: the completion came from the cache.
    """

    token_id: int
    logprob: float
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None
    finish_reason: str = ""
    cached: bool = False


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Teacher cache: lookups since the daemon started, and what is on disk."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    evicted: int = 0
    milliseconds_saved: float = 0.0
    entries: int = 0
    bytes: int = 0
    limit_bytes: int = 0


class RunState(StrEnum):
    """Life of a run. Resting states end it; STOPPED, FAILED and INTERRUPTED runs can be resumed."""

    PENDING = "PENDING"
    PLANNING = "PLANNING"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"

    @property
    def resting(self) -> bool:
        """Whether nothing happens to the run any more unless someone resumes it."""
        return self in RESTING

    @property
    def resumable(self) -> bool:
        """Whether ResumeRun may take the run up again."""
        return self in RESUMABLE


RESUMABLE = frozenset({RunState.STOPPED, RunState.FAILED, RunState.INTERRUPTED})
RESTING = RESUMABLE | {RunState.SUCCEEDED}


# A part of the disk that a plan counts and that is no run's.
TEACHER_CACHE = "teacher cache"


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """One part of what a run takes. process: "daemon" or "worker", empty for disk."""

    process: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take, computed before anything loads.

    phases: seconds by phase, over all steps. memory, disk: the peaks by part; parts of one process that never live
    together are not added up. assumptions, warnings, advice: sentences; advice says what to change. machine: planned
    for, in words. calibrated: the rates were measured here, with models of these shapes. fits: memory and disk suffice.
    """

    seconds: float
    daemon_peak_bytes: int
    worker_peak_bytes: int
    disk_bytes: int
    available_bytes: int
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    phases: tuple[tuple[str, float], ...] = ()
    memory: tuple[PlannedBytes, ...] = ()
    disk: tuple[PlannedBytes, ...] = ()
    advice: tuple[str, ...] = ()
    machine: str = ""
    calibrated: bool = False
    fits: bool = True

    @property
    def peak_bytes(self) -> int:
        """Peak of daemon and worker together."""
        return self.daemon_peak_bytes + self.worker_peak_bytes


@dataclass(frozen=True, slots=True)
class Run:
    """One distillation run as the daemon knows it. `config` is the validated run configuration as plain JSON data."""

    run_id: str
    state: RunState
    config: dict[str, Any]
    created_at: datetime
    request_id: str = ""
    session_id: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    step: int = 0
    total_steps: int = 0
    seconds_remaining: float | None = None
    plan: Plan | None = None
    latest_metrics: dict[str, Any] = field(default_factory=dict)
    checkpoint_step: int | None = None
    best_step: int | None = None
    adapter_path: str = ""
    error_reason: str = ""
    error_message: str = ""
    attempt: int = 0
    memory_halvings: int = 0
    report_path: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved adapter. `validation_kl` (nats) is None when no evaluation was made at that step."""

    step: int
    path: str
    created_at: datetime
    bytes: int
    is_best: bool = False
    is_final: bool = False
    validation_kl: float | None = None


class EventKind(StrEnum):
    """Kinds of durable events; each names the type of its payload."""

    RUN_STATE = "RUN_STATE"
    METRICS = "METRICS"
    EVALUATION = "EVALUATION"
    CHECKPOINT = "CHECKPOINT"
    LOG = "LOG"
    SAMPLE = "SAMPLE"
    TEACHER = "TEACHER"


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the durable log. `revision` is global, > 0 and gap-free per store; 0 before it is stored."""

    kind: EventKind
    run_id: str
    payload: dict[str, Any]
    time: datetime
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Gauges:
    """Ephemeral readings of a run or the daemon: the last value wins, never stored."""

    run_id: str
    time: datetime
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer update. Losses and KLs in nats per token, at `temperature` where they are losses.

    kl_* describe the trained divergence per token, before T²: its mean, spread and extremes over the step's tokens.
    forward_kl, reverse_kl, js_divergence: at temperature 1, over the whole vocabulary where `exact`, else over the
    sparse support with its tail (lower bounds of the exact values). agreement: share of positions where both models'
    most likely token is the same; top5_agreement: where the teacher's most likely token is among the student's five
    most likely. bias_gap: exact minus approximate trained divergence per token, on bias_tokens tokens.
    staleness: updates between the student that sampled and the one that was updated. *_peak_bytes: of the worker's
    MLX in that phase. compared_tokens: those that kl_mean to teacher_entropy are about; where there are none, those
    numbers are no measurements. The rest is named as in the contract's StepMetrics.
    """

    step: int
    total_steps: int
    loss: float
    kl_loss: float
    ce_loss: float
    kl_mean: float
    kl_std: float
    kl_max: float
    kl_min: float
    forward_kl: float
    reverse_kl: float
    js_divergence: float
    agreement: float
    top5_agreement: float
    teacher_entropy: float
    student_entropy: float
    temperature: float
    learning_rate: float
    grad_norm: float
    tokens: int
    samples: int
    tokens_per_second: float
    rollout_milliseconds: float
    teacher_milliseconds: float
    student_milliseconds: float
    step_milliseconds: float
    completion_length: float
    truncated_fraction: float
    cache_hits: int
    cache_misses: int
    active_memory_bytes: int
    peak_memory_bytes: int
    seconds_elapsed: float
    seconds_remaining: float
    exact: bool = False
    bias_gap: float | None = None
    bias_tokens: int = 0
    teacher_support_mass: float | None = None
    student_support_mass: float | None = None
    clipped_fraction: float = 0.0
    repetition_fraction: float = 0.0
    on_policy_fraction: float = 0.0
    staleness: int = 0
    micro_batches: int = 0
    rollout_tokens_per_second: float = 0.0
    teacher_tokens_per_second: float = 0.0
    student_tokens_per_second: float = 0.0
    rollout_peak_bytes: int = 0
    teacher_peak_bytes: int = 0
    student_peak_bytes: int = 0
    compared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Teacher and student compared on some tokens: nats per token and shares, at temperature 1.

    acceptance: Σ min(student, teacher). half_widths: half the 95 % confidence interval of each mean, by name, with
    completions as the independent draws. quartiles: the same by quarter of the position in the completion.
    """

    forward_kl: float
    reverse_kl: float
    js_divergence: float
    agreement: float
    top5_agreement: float
    teacher_entropy: float
    student_entropy: float
    acceptance: float
    tokens: int
    samples: int
    half_widths: dict[str, float] = field(default_factory=dict)
    quartiles: tuple[Comparison, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """Student against teacher on the held-out prompts, on the teacher's own greedy completions, at temperature 1.

    `exact` tells whether the KLs are over the full vocabulary or, for a teacher whose head can't be split off, over
    the sparse support with its tail. checkpoint_path is empty when no checkpoint was written at this step.
    on_teacher: the same with its uncertainty; on_student: on completions the student sampled at this step.
    validation_kl: what the best checkpoint is chosen by. tasks: accuracy by task.
    """

    step: int
    forward_kl: float
    reverse_kl: float
    js_divergence: float
    agreement: float
    top5_agreement: float
    teacher_entropy: float
    student_entropy: float
    exact: bool
    tokens: int
    samples: int
    seconds: float
    is_best: bool = False
    checkpoint_path: str = ""
    on_teacher: Comparison | None = None
    on_student: Comparison | None = None
    validation_kl: float | None = None
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """Let several models of a run answer the same prompts.

    prompts: as a user would type them. max_tokens: 0 is the run's max_generation_tokens. models: of `COMPARED_MODELS`,
    empty for all the run has. temperature: 0 is greedy. speculative: the teacher also answers with the distilled
    student as its draft model.
    """

    run_id: str
    prompts: tuple[str, ...]
    max_tokens: int = 0
    models: tuple[str, ...] = ()
    temperature: float = 0.0
    speculative: bool = False


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What was measured of one model, answering one prompt at a time; seconds include the prompts.

    speedup: over the teacher. weight_bytes: in memory, adapter included. forward_kl, reverse_kl: to the teacher, nats
    per token over the full vocabulary on the teacher's completions; agreement: with its likeliest token; acceptance:
    Σ min(model, teacher). accepted_fraction: of the tokens drafted in speculative decoding.
    """

    tokens: int
    seconds: float
    weight_bytes: int
    adapter_bytes: int = 0
    peak_bytes: int = 0
    speedup: float | None = None
    forward_kl: float | None = None
    reverse_kl: float | None = None
    agreement: float | None = None
    acceptance: float | None = None
    accepted_fraction: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A piece of one model's answer to one prompt, `tokens` long; with a model's last one, its summary."""

    model: str
    prompt_index: int = 0
    text: str = ""
    tokens: int = 0
    finish_reason: str = ""
    summary: ModelSummary | None = None
