"""Bytes a run takes, part by part: memory of daemon and worker, and disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from opd_daemon.config import RunConfig
from opd_daemon.distill.activations import block_bytes, kept_blocks
from opd_daemon.distill.rates import Pair
from opd_daemon.distill.workload import STUDENT_DECODES, Decode, Forward, Workload, own_samples
from opd_daemon.types import TEACHER_CACHE, PlannedBytes

MIB = 1 << 20
GIB = 1 << 30

# What Python, MLX, numpy, gRPC and the tokenizer take in each process; in the worker also what draws the report.
DAEMON_PROCESS_BYTES = 134 * MIB
WORKER_PROCESS_BYTES = 196 * MIB

# Freed buffers that MLX keeps for reuse, at most. What the work of one moment leaves behind seldom suits another's.
# On a CPU they come from malloc, which costs little, so fewer are worth keeping.
DAEMON_CACHE_BYTES, WORKER_CACHE_BYTES, HOST_CACHE_BYTES = GIB, 2 * GIB, 256 * MIB

# The daemon scores this many tokens together, in pieces of a sequence, and its head works on so many bytes of logits.
SCORED_TOKENS = 2048
SCORED_PIECE = 512
DAEMON_CHUNK_BYTES = 64 * MIB
# Logits of one chunk of rows in the worker.
WORKER_CHUNK_BYTES = 28 * MIB

# Alive at once while one chunk is worked on, in units of the chunk. Training reuses the student's logits for their
# gradient; evaluating compares every measure of both.
SCORED_COPIES = 1.5
EXACT_COPIES = 2
SPARSE_COPIES = 2
COMPARED_COPIES = 5

# A forward without a gradient holds so many arrays of the feed-forward part's width and of the model's.
INNER_ARRAYS, HIDDEN_ARRAYS = 6, 4
# A token of the vocabulary, in the tokenizer and the tables made of it.
TOKEN_BYTES = 1600
# Key-value caches are taken in steps of so many tokens. Every time one grows, or so many sequences join it, a cache is
# left behind whose buffers nothing else needs.
CACHE_STEP = 256
JOINING = 8
STUDENT_LEFTOVERS = 2

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
    teacher, context = pair.teacher, work.teacher_context
    together = max(1, min(work.step_sequences, SCORED_TOKENS // max(1, context)))
    piece = min(context, SCORED_PIECE)
    widest = teacher.value_bytes * (INNER_ARRAYS * teacher.inner + HIDDEN_ARRAYS * teacher.hidden)
    attention = 8 * teacher.heads * context if pair.on_host else 0
    activations = together * piece * (widest + attention)
    logits = SCORED_COPIES * _chunk(DAEMON_CHUNK_BYTES, teacher.width, together * piece)
    decoded = int(
        max(task.item.sequences for task in work.tasks if isinstance(task.item, Decode) and task.kind == "write")
    )
    decoding = decoded * _cached(context) * teacher.kv_bytes()
    parts = [
        Part("daemon", "process", DAEMON_PROCESS_BYTES),
        Part("daemon", "tokenizer", TOKEN_BYTES * teacher.width),
        Part("daemon", "teacher weights", teacher.weight_bytes),
        Part("daemon", "scoring activations", activations, frozenset({"score"})),
        Part("daemon", "logits chunk", int(logits), frozenset({"score"})),
        Part("daemon", "generation KV", decoding, frozenset({"write"})),
    ]
    if context > SCORED_PIECE:
        parts.append(Part("daemon", "scoring KV", together * context * teacher.kv_bytes(), frozenset({"score"})))
    kept = HOST_CACHE_BYTES if pair.on_host else DAEMON_CACHE_BYTES
    return [*parts, _buffers(parts, -(-decoded // JOINING) * decoding, kept)]


def worker_parts(work: Workload, pair: Pair, memory_bytes: int) -> list[Part]:
    """What the worker holds while it trains, on a machine with so much memory."""
    student, config = pair.student, work.config
    state = 4 * pair.adapter * (3 + OPTIMIZER_MOMENTS[config.optimizer])  # weights, two sets of gradients, moments
    rows = int(work.largest.rows)
    chunk = _chunk(WORKER_CHUNK_BYTES, student.width, rows)
    copies = EXACT_COPIES if pair.exact else SPARSE_COPIES
    shown = min(own_samples(config, work.lengths), STUDENT_DECODES)
    decoding = max(work.sampled_sequences, shown) * _cached(work.context) * student.kv_bytes()
    activations = activation_bytes(work, pair, memory_bytes)
    parts = [
        Part("worker", "process", WORKER_PROCESS_BYTES),
        Part("worker", "tokenizer", TOKEN_BYTES * student.width),
        Part("worker", "student weights", student.weight_bytes),
        # Evaluation is exact whatever is trained, so the head is always there.
        Part("worker", "teacher head", pair.teacher.head_bytes),
        Part("worker", "teacher head, as sent", pair.teacher.head_bytes, frozenset({"load"})),
        Part("worker", "adapter and optimizer", int(state)),
        Part("worker", "activations", activations, frozenset({"train"})),
        Part("worker", "logits chunk", copies * chunk, frozenset({"train"})),
        Part("worker", "teacher targets", _target_bytes(work, pair, rows), frozenset({"train"})),
        Part("worker", "logits compared", COMPARED_COPIES * chunk, frozenset({"evaluate"})),
        Part("worker", "rollout KV", decoding, frozenset({"rollout"})),
    ]
    if pair.stored_bytes != student.weight_bytes:
        parts.append(Part("worker", "weights as stored", pair.stored_bytes, frozenset({"load"})))
    # Completions differ in length, and buffers of one micro-batch don't suit a longer or a shorter one.
    leftovers = STUDENT_LEFTOVERS * decoding + activations
    return [*parts, _buffers(parts, leftovers, worker_cache_bytes(on_host=pair.on_host))]


def worker_cache_bytes(*, on_host: bool) -> int:
    """Most bytes of freed buffers a worker keeps."""
    return HOST_CACHE_BYTES if on_host else WORKER_CACHE_BYTES


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
    cached = 0.0
    for task in work.tasks:
        if task.kind == "score" and isinstance(task.item, Forward):
            each = hidden_bytes(pair) if task.phase == "evaluate" else position_bytes(config, pair)
            cached += task.count * task.item.rows * each
    state = 4 * pair.adapter
    moments = OPTIMIZER_MOMENTS[config.optimizer]
    checkpoints = (1 + moments) * state * (1 if config.save_best_only else config.keep_last_n) + 2 * state
    rollouts = config.num_steps * work.step_sequences * (80 + 11 * config.max_generation_tokens)
    parts = {
        TEACHER_CACHE: cached if config.use_cache else 0,
        "checkpoints": checkpoints,
        "rollouts": rollouts,
        "metrics and report": 2 * MIB + config.num_steps * 2500,
    }
    return [PlannedBytes("", name, int(size)) for name, size in parts.items() if size]


def position_bytes(config: RunConfig, pair: Pair) -> float:
    """Bytes of one position scored for training in the teacher's cache."""
    if pair.exact:
        return hidden_bytes(pair)
    facts = 12 + (4 if config.temperature != 1 else 0)
    return facts if config.signal == "sampled" else facts + 8 * config.top_k + 4


def hidden_bytes(pair: Pair) -> float:
    """Bytes of one position whose hidden state is kept, as evaluation always needs it."""
    return pair.teacher.hidden * pair.teacher.value_bytes


def _target_bytes(work: Workload, pair: Pair, rows: int) -> int:
    """Of the whole step: they are there while it trains, as they came and as arrays."""
    if not work.regime.scores:
        return 0
    return int(2 * rows * work.config.gradient_accumulation_steps * position_bytes(work.config, pair))


def _chunk(limit: int, width: int, rows: int) -> int:
    return min(max(limit, 16 * width * 4), rows * width * 4)


def _cached(context: int) -> int:
    """Tokens a key-value cache has room for."""
    return -(-context // CACHE_STEP) * CACHE_STEP


def _buffers(parts: Sequence[Part], leftovers: int, limit: int) -> Part:
    """Freed buffers MLX keeps: those of the moments that don't take the most."""
    moments = [sum(part.bytes for part in parts if moment in part.during) for moment in get_args(Moment)]
    return Part(parts[0].process, "buffers kept", min(limit, sum(moments) - max(moments) + leftovers))
