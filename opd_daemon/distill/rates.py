"""How long each kind of work takes on a machine: measured there, or from what is published about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from opd_daemon.config import LoraConfig
from opd_daemon.distill.machines import Machine
from opd_daemon.distill.shape import Shape
from opd_daemon.distill.workload import Decode, Forward, Item, Kind, Update

FIT_ROUNDS = 5000

# One request to the daemon and back for one sequence: encoding, sockets, cache; and for each byte of its answer.
CALL_SECONDS = 0.001
WIRE_BYTES_PER_SECOND = 4e8


@dataclass(frozen=True, slots=True)
class Pair:
    """A student and a teacher as they are loaded.

    stored_bytes: the student's weights as they are on disk. adapter: trainable weights, in `adapted` blocks. exact: the
    teacher's head is needed. lora: the adapter's rank, dropout and kind. on_host: MLX computes on a CPU.
    """

    student: Shape
    teacher: Shape
    stored_bytes: int
    adapter: int
    adapted: int
    exact: bool
    lora: LoraConfig = field(default_factory=LoraConfig)
    on_host: bool = False


class Rates(Protocol):
    """Seconds of work on one machine. start: of a worker process. read_bytes, hash_bytes: a second, of weights."""

    @property
    def calibrated(self) -> bool:
        """Whether they were measured on this machine."""
        ...

    @property
    def start(self) -> float:
        """Seconds until a worker process has imported what it needs."""
        ...

    @property
    def read_bytes(self) -> float:
        """Bytes of weights loaded in a second."""
        ...

    @property
    def hash_bytes(self) -> float:
        """Bytes of weights fingerprinted in a second."""
        ...

    def seconds(self, kind: Kind, item: Item, pair: Pair) -> float:
        """How long one piece of work takes."""
        ...


@dataclass(frozen=True, slots=True)
class AssumedRates:
    """From the rates of a machine: FLOP of products, and bytes of weights read for every decoded token."""

    machine: Machine
    recompute: bool

    calibrated = False
    start = 4.0
    hash_bytes = 1.5e9

    @property
    def read_bytes(self) -> float:
        """As `Rates.read_bytes`."""
        return self.machine.disk

    def seconds(self, kind: Kind, item: Item, pair: Pair) -> float:
        """As `Rates.seconds`."""
        machine, student = self.machine, pair.student
        if isinstance(item, Update):
            return 60.0 * pair.adapter * (1 + item.micro_batches / 4) / machine.bandwidth
        if isinstance(item, Decode):
            model = pair.teacher if kind == "write" else student
            prefill = _products(model, Forward(item.prompts, item.prompt, 0)) / machine.score_flops
            products = 2 * item.sequences * model.parameters
            token = model.weight_bytes / machine.bandwidth + products / machine.decode_flops
            return prefill + item.tokens * token
        teacher_head = 2 * pair.teacher.head_parameters * item.rows
        if kind == "score":
            return _products(pair.teacher, item) / machine.score_flops + item.sequences * CALL_SECONDS
        if kind == "compare":
            return (_products(student, item) + teacher_head) / machine.score_flops
        passes = 3.0 if self.recompute else 2.0
        products = passes * _products(student, Forward(item.sequences, item.length, 0))
        return (products + 4 * student.head_parameters * item.rows + pair.exact * teacher_head) / machine.train_flops


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """Weights of `features` for every kind of work, fitted to measurements on this machine."""

    weights: Mapping[Kind, Sequence[float]]
    start: float
    read_bytes: float
    hash_bytes: float

    calibrated = True

    def seconds(self, kind: Kind, item: Item, pair: Pair) -> float:
        """As `Rates.seconds`."""
        found = float(np.dot(self.weights[kind], features(kind, item, pair)))
        if kind == "score" and isinstance(item, Forward):
            answer = item.rows * pair.teacher.hidden * pair.teacher.value_bytes
            found += item.sequences * CALL_SECONDS + answer / WIRE_BYTES_PER_SECOND
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in ("weights", "start", "read_bytes", "hash_bytes")}


def features(kind: Kind, item: Item, pair: Pair) -> list[float]:
    """What the time of a piece of work is linear in: its fixed cost, its layers, tokens, attention and head rows."""
    layers: float = pair.teacher.layers if kind in ("score", "write") else pair.student.layers
    if kind == "learn":  # all forward, and about as long for every adapted one back
        layers = (layers + pair.adapted) / 2
    if isinstance(item, Update):
        return [1.0, pair.adapter, pair.adapter * item.micro_batches]
    if isinstance(item, Decode):
        seen = item.prompt + item.tokens / 2
        batch = item.tokens * item.sequences
        return [
            1.0,
            layers * item.prompts * item.prompt,
            item.tokens,
            batch,
            layers * item.tokens,
            layers * batch,
            layers * batch * seen,
        ]
    return [1.0, layers, layers * item.tokens, layers * item.tokens * item.length, item.rows]


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Weights ≥ 0 that explain measured seconds with the least relative error (least squares by coordinates)."""
    table: npt.NDArray[np.float64] = np.asarray(rows, np.float64) / np.asarray(seconds, np.float64)[:, None]
    scale = np.linalg.norm(table, axis=0)
    scale[scale == 0] = 1.0
    table = table / scale
    gram, aim = table.T @ table, table.sum(axis=0)
    weights = np.zeros(table.shape[1])
    for _ in range(FIT_ROUNDS):
        for place in range(len(weights)):
            if gram[place, place] > 0:
                step = (aim[place] - gram[place] @ weights) / gram[place, place]
                weights[place] = max(0.0, weights[place] + step)
    return [float(value) for value in weights / scale]


def _products(model: Shape, item: Forward) -> float:
    attention = 2 * item.tokens * item.length * model.heads * model.head_dim
    return 2 * item.rows * model.head_parameters + model.layers * (2 * item.tokens * model.block_parameters + attention)
