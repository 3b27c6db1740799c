"""Bytes a run takes, part by part: memory of daemon and worker, and disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from opd_daemon.config import RunConfig
from opd_daemon.distill.activations import block_bytes, kept_blocks
from opd_daemon.distill.rates import Pair
from opd_daemon.distill.workload import STUDENT_DECODES, TEACHER_DECODES, Forward, Workload
from opd_daemon.types import PlannedBytes

MIB = 1 << 20
GIB = 1 << 30

# What Python, MLX, numpy, gRPC and the tokenizer take in each process.
DAEMON_PROCESS_BYTES = 155 * MIB
WORKER_PROCESS_BYTES = 205 * MIB

# Freed buffers that MLX keeps for reuse: at most these, and in practice this share of what the work itself takes.
DAEMON_CACHE_BYTES = GIB
WORKER_CACHE_BYTES = 2 * GIB
CACHED_SHARE = 0.5

# The daemon scores this many tokens together, in pieces of a sequence, and its head works on so many bytes of logits.
SCORED_TOKENS = 2048
SCORED_PIECE = 512
DAEMON_CHUNK_BYTES = 64 * MIB
# Logits of one chunk of rows in the worker.
WORKER_CHUNK_BYTES = 28 * MIB

# Alive at once while one chunk is worked on, in units of the chunk: logits, teacher's logits, differences, gradient.
EXACT_COPIES = 6
SPARSE_COPIES = 4
SCORED_COPIES = 3

# A forward keeps this many arrays of the block's widest layer alive while nothing needs a gradient.
FORWARD_ARRAYS = 4
# Caches grow by copying.
CACHE_COPIES = 1.5

OPTIMIZER_MOMENTS = {"adamw": 2.0, "adam": 2.0, "lion": 1.0, "muon": 1.0, "sgd": 0.0, "adafactor": 0.1}

Moment = Literal["load", "score", "write", "rollout", "train", "evaluate"]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part of a process. during: the moments it is there; none for always."""

    process: str
    name: str
    bytes: int
    during: frozenset[Moment] = frozenset()


def daemon_parts(work: Workload, pair: Pair) -> list[Part]:
    """What the daemon holds while it teaches."""
    teacher = pair.teacher
    together = max(1, min(work.step_sequences, SCORED_TOKENS // max(1, work.context)))
    piece = min(work.context, SCORED_PIECE) if work.context > SCORED_PIECE else work.context
    widest = max(teacher.inner * 3, teacher.hidden * FORWARD_ARRAYS, 2 * teacher.heads * teacher.head_dim)
    attention = 4 * together * teacher.heads * piece * work.context * 2
    parts = [
        Part("daemon", "process", DAEMON_PROCESS_BYTES),
        Part("daemon", "teacher weights", teacher.weight_bytes),
        Part(
            "daemon",
            "scoring activations",
            together * piece * widest * teacher.value_bytes + attention,
            frozenset({"score"}),
        ),
        Part("daemon", "logits chunk", SCORED_COPIES * _chunk(DAEMON_CHUNK_BYTES, teacher.width, together * piece)),
    ]
    if work.context > SCORED_PIECE:
        parts.append(Part("daemon", "scoring KV", together * work.context * teacher.kv_bytes(), frozenset({"score"})))
    decoded = min(TEACHER_DECODES, max(len(work.lengths.held_out), work.step_sequences if work.regime.writes else 0))
    decoding = int(decoded * work.context * teacher.kv_bytes() * CACHE_COPIES)
    parts.append(Part("daemon", "generation KV", decoding, frozenset({"write"})))
    return [*parts, _buffers("daemon", parts, DAEMON_CACHE_BYTES)]


def worker_parts(work: Workload, pair: Pair, memory_bytes: int) -> list[Part]:
    """What the worker holds while it trains, on a machine with so much memory."""
    student, config = pair.student, work.config
    state = 4 * pair.adapter * (3 + OPTIMIZER_MOMENTS[config.optimizer])  # weights, two sets of gradients, moments
    rows = int(work.largest.rows)
    copies = EXACT_COPIES if pair.exact else SPARSE_COPIES
    parts = [
        Part("worker", "process", WORKER_PROCESS_BYTES),
        Part("worker", "student weights", student.weight_bytes),
        Part("worker", "adapter and optimizer", int(state)),
        Part("worker", "activations", activation_bytes(work, pair, memory_bytes), frozenset({"train"})),
        Part(
            "worker",
            "logits chunk",
            copies * _chunk(WORKER_CHUNK_BYTES, student.width, rows),
            frozenset({"train", "evaluate"}),
        ),
        Part("worker", "teacher targets", _target_bytes(config, pair, rows), frozenset({"train"})),
    ]
    if pair.stored_bytes != student.weight_bytes:
        parts.append(Part("worker", "weights as stored", pair.stored_bytes, frozenset({"load"})))
    if pair.exact:
        parts.append(Part("worker", "teacher head", pair.teacher.head_bytes))
    sampled = min(STUDENT_DECODES, work.step_sequences) if work.regime.on_policy else 0
    shown = min(config.max_eval_samples, len(work.lengths.held_out), STUDENT_DECODES)
    decoding = max(sampled, shown) * (work.context * student.kv_bytes() * CACHE_COPIES + 8 * student.width)
    parts.append(Part("worker", "rollout KV", int(decoding), frozenset({"rollout"})))
    return [*parts, _buffers("worker", parts, WORKER_CACHE_BYTES)]


def activation_bytes(work: Workload, pair: Pair, memory_bytes: int) -> int:
    """What a forward keeps for its backward: every block's input, and everything of as many blocks as the mode says."""
    student, batch, config = pair.student, work.largest, work.config
    each = block_bytes(student, int(batch.sequences), int(batch.length), pair.lora, on_host=pair.on_host)
    kept = kept_blocks(config.backward, pair.adapted, each, config.worker_memory_limit_bytes or memory_bytes)
    inputs = pair.adapted * int(batch.tokens) * student.hidden * student.value_bytes
    return inputs + max(kept, 1) * each


def peak(parts: Iterable[Part]) -> int:
    """The most that is there at one moment."""
    parts = list(parts)
    moments: frozenset[Moment] = frozenset().union(*(part.during for part in parts)) or frozenset({"train"})
    return max(sum(part.bytes for part in parts if not part.during or moment in part.during) for moment in moments)


def disk_parts(work: Workload, pair: Pair) -> list[PlannedBytes]:
    """What stays on disk: cache entries of every scored position, checkpoints, rollouts, and the report."""
    config = work.config
    scores = [task for task in work.tasks if task.kind == "score"]
    scored = sum(task.count * task.item.rows for task in scores if isinstance(task.item, Forward))
    state = 4 * pair.adapter
    moments = OPTIMIZER_MOMENTS[config.optimizer]
    checkpoints = (1 + moments) * state * (1 if config.save_best_only else config.keep_last_n) + 2 * state
    rollouts = config.num_steps * work.step_sequences * (80 + 11 * config.max_generation_tokens)
    parts = {
        "teacher cache": scored * position_bytes(config, pair) if config.use_cache else 0,
        "checkpoints": checkpoints,
        "rollouts": rollouts,
        "metrics and report": 2 * MIB + config.num_steps * 2500,
    }
    return [PlannedBytes("", name, int(size)) for name, size in parts.items() if size]


def position_bytes(config: RunConfig, pair: Pair) -> float:
    """Bytes of one scored position in the teacher's cache."""
    facts = 12 + (4 if config.temperature != 1 else 0)
    if pair.exact:
        return facts + pair.teacher.hidden * pair.teacher.value_bytes
    if config.signal == "sampled":
        return facts
    ids = config.top_k
    return facts + 8 * ids + 4


def _target_bytes(config: RunConfig, pair: Pair, rows: int) -> int:
    sequences = config.gradient_accumulation_steps  # the targets of the whole step are there while it trains
    return int(rows * sequences * position_bytes(config, pair) * 2)


def _chunk(limit: int, width: int, rows: int) -> int:
    return min(max(limit, 16 * width * 4), rows * width * 4)


def _buffers(process: str, parts: Iterable[Part], limit: int) -> Part:
    """Freed buffers MLX keeps: they come from what isn't there all the time."""
    passing = sum(part.bytes for part in parts if part.during)
    return Part(process, "buffers kept", min(limit, int(CACHED_SHARE * passing)))
