"""What a run takes, before anything loads: seconds by phase, bytes by part, and what to change where it is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from opd_daemon.config import LoraConfig, RunConfig
from opd_daemon.distill.activations import block_bytes, kept_blocks
from opd_daemon.distill.adapter import read_adapter_config
from opd_daemon.distill.footprint import (
    WORKER_CHUNK_BYTES,
    WORKER_PROCESS_BYTES,
    Part,
    daemon_parts,
    disk_parts,
    peak,
    worker_parts,
)
from opd_daemon.distill.machines import Machine
from opd_daemon.distill.rates import WIRE_BYTES_PER_SECOND, AssumedRates, Pair, Rates
from opd_daemon.distill.shape import adapter_parameters, in_float32, shape_of, stored_parameters
from opd_daemon.distill.workload import (
    PHASES,
    Decode,
    Forward,
    Lengths,
    Phase,
    Regime,
    Workload,
    measure_lengths,
    workload_of,
)
from opd_daemon.models.folder import ModelFolder, read_folder
from opd_daemon.readable import size
from opd_daemon.types import TEACHER_CACHE, Plan, PlannedBytes

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainerInfo

# Logits the worker works on at once.
CHUNK_BYTES = WORKER_CHUNK_BYTES

# Above this share of the memory there is, other programs and the plan's own error may be too much.
TIGHT = 0.85
SHOWN_ADVICE = 5
# Advice on time is worth giving from this share of it on.
WORTH_SAVING = 0.15
# Four bits in groups of 64, with a scale and a bias of 16 bits each.
QUANTISED_BITS = 4.5

# Held-out prompts that still tell something.
FEW_HELD_OUT = 8

SAVE_SECONDS = 0.05
REPORT_SECONDS = 2.5
STEP_SECONDS = 0.02
WRITTEN_BYTES_PER_SECOND = 3e8
# On a CPU each model proves that it decodes right in another way: about as much work as this.
PROOF = Decode(sequences=2, prompt=4, tokens=8, prompts=2)
# And before the first step gradients block by block are compared with plain ones: about this, so many times.
PROBE, PROBES = Forward(sequences=2, length=8, rows=8), 3


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What is free where runs and teacher cache are kept, and what the cache holds and may grow to; in bytes."""

    free_bytes: int
    cache_bytes: int
    cache_limit_bytes: int


@dataclass(frozen=True, eq=False)
class RunFacts:
    """Everything a plan follows from besides rates. loaded: the teacher is in memory already. disk: None if unknown."""

    config: RunConfig
    regime: Regime
    lengths: Lengths
    student: ModelFolder
    teacher: ModelFolder
    machine: Machine
    loaded: bool = False
    disk: DiskSpace | None = None

    @classmethod
    def read(
        cls,
        config: RunConfig,
        trainer: TrainerInfo,
        machine: Machine,
        *,
        loaded: bool,
        disk: DiskSpace | None = None,
    ) -> RunFacts:
        """Read configurations, headers and prompts of a run that has passed `check_run`.

        Raises:
            OpdError: a file has gone since, with what `check_run` would say.
        """
        student, teacher = (read_folder(Path(path)) for path in (config.base_model_path, config.teacher_model_path))
        return cls(config, Regime.of(config, trainer), measure_lengths(config), student, teacher, machine, loaded, disk)

    @cached_property
    def pair(self) -> Pair:
        """The two models as they are loaded."""
        config = self.config
        float32 = self.machine.float32 or not config.mixed_precision
        student = shape_of(in_float32(self.student) if float32 else self.student)
        lora, adapter = config.lora, adapter_parameters(self.student, config.lora)
        if config.student_adapter_path:
            folder = Path(config.student_adapter_path)
            stored = read_adapter_config(folder)
            lora = LoraConfig(
                rank=stored.rank, dropout=stored.dropout, dora=stored.dora, num_layers=max(-1, stored.num_layers)
            )
            adapter = stored_parameters(folder)
        adapted = student.layers if lora.num_layers <= 0 else min(lora.num_layers, student.layers)
        exact = config.signal == "exact" and self.regime.scores
        return Pair(
            student,
            shape_of(self.teacher),
            self.student.weight_bytes,
            adapter,
            adapted,
            exact,
            lora,
            self.machine.float32,
        )

    @cached_property
    def work(self) -> Workload:
        """What the run computes."""
        return workload_of(self.config, self.regime, self.lengths)

    @cached_property
    def parts(self) -> list[Part]:
        """What both processes hold."""
        return [*daemon_parts(self.work, self.pair), *worker_parts(self.work, self.pair, self.machine.total_bytes)]

    @property
    def peaks(self) -> tuple[int, int]:
        """Bytes of daemon and worker when both together take the most.

        With precompute the teacher is unloaded before the student loads.
        """
        daemon, worker = (peak(part for part in self.parts if part.process == name) for name in ("daemon", "worker"))
        if not self.config.precompute:
            return daemon, worker
        bare = sum(part.bytes for part in self.parts if (part.process, part.name) == ("daemon", "process"))
        return max((daemon, WORKER_PROCESS_BYTES), (bare, worker), key=sum)

    @property
    def worker_peak(self) -> int:
        """Bytes of the worker when it takes the most."""
        return peak(part for part in self.parts if part.process == "worker")

    @cached_property
    def disk_parts(self) -> list[PlannedBytes]:
        """What stays on disk."""
        return disk_parts(self.work, self.pair)

    @property
    def recomputes(self) -> bool:
        """Whether most blocks are computed a second time for their gradient."""
        batch = self.work.largest
        each = block_bytes(
            self.pair.student, int(batch.sequences), int(batch.length), self.pair.lora, on_host=self.pair.on_host
        )
        memory = self.config.worker_memory_limit_bytes or self.machine.total_bytes
        return kept_blocks(self.config.backward, self.pair.adapted, each, memory) < self.pair.adapted / 2

    def rates(self) -> Rates:
        """Published rates of the machine."""
        return AssumedRates(self.machine, self.recomputes)

    def seconds(self, rates: Rates) -> dict[Phase, float]:
        """Time by phase."""
        phases = dict.fromkeys(PHASES, 0.0)
        for task in self.work.tasks:
            phases[task.phase] += task.count * rates.seconds(task.kind, task.item, self.pair)
        phases["train"] += self.config.num_steps * STEP_SECONDS + PROBES * rates.seconds("learn", PROBE, self.pair)
        phases["load"] += self._loading(rates)
        phases["checkpoint"] += self._saving()
        phases["report"] += REPORT_SECONDS
        return phases

    def _loading(self, rates: Rates) -> float:
        pair = self.pair
        teacher = 0.0 if self.loaded else pair.teacher.weight_bytes * (1 / rates.read_bytes + 1 / rates.hash_bytes)
        # The base is fingerprinted before and after training.
        student = pair.stored_bytes / rates.read_bytes + 2 * pair.student.weight_bytes / rates.hash_bytes
        proofs = 0.0
        if pair.on_host:
            proofs = rates.seconds("sample", PROOF, pair) + (not self.loaded) * rates.seconds("write", PROOF, pair)
        return rates.start + teacher + student + proofs + pair.teacher.head_bytes / WIRE_BYTES_PER_SECOND

    def _saving(self) -> float:
        config, adapter = self.config, 4 * self.pair.adapter
        whole = config.num_steps // config.checkpoint_every + 1
        best = config.num_steps // config.eval_every + 1
        written = whole * 3 * adapter + (best + 1) * adapter
        return (whole + best + 1) * SAVE_SECONDS + written / WRITTEN_BYTES_PER_SECOND


def plan(facts: RunFacts, rates: Rates | None = None) -> Plan:
    """The plan of a run, with measured rates or, without, with those published about its machine."""
    rates = rates or facts.rates()
    phases = facts.seconds(rates)
    daemon, worker = facts.peaks
    obstacles = tuple(_obstacles(facts))
    return Plan(
        seconds=sum(phases.values()),
        daemon_peak_bytes=daemon,
        worker_peak_bytes=worker,
        disk_bytes=sum(part.bytes for part in facts.disk_parts),
        available_bytes=facts.machine.usable_bytes,
        assumptions=tuple(_assumptions(facts, rates)),
        warnings=(*obstacles, *_warnings(facts)),
        phases=tuple((name, seconds) for name, seconds in phases.items() if seconds),
        memory=tuple(PlannedBytes(part.process, part.name, part.bytes) for part in facts.parts if part.bytes),
        disk=tuple(facts.disk_parts),
        advice=tuple(_advice(facts, rates)),
        machine=facts.machine.name,
        calibrated=rates.calibrated,
        fits=not obstacles,
    )


def _assumptions(facts: RunFacts, rates: Rates) -> Iterator[str]:
    config, lengths = facts.config, facts.lengths
    machine = facts.machine
    if rates.calibrated:
        yield "rates measured on this machine, with random weights in models of these shapes"
    else:
        yield (
            f"rates of {machine.name}, not measured: {machine.score_flops / 1e12:.3g} TFLOP/s in scoring and "
            f"{machine.train_flops / 1e12:.3g} in training, weights read at {machine.bandwidth / 1e9:.0f} GB/s"
        )
    prompt = sum(lengths.train) / len(lengths.train)
    given = facts.regime.on_policy == 0 and not facts.regime.writes
    completions = "the data's own completions" if given else f"completions of {config.max_generation_tokens} tokens"
    yield f"prompts of {prompt:.0f} tokens on average, {completions}, none ending early"
    yield "nothing in the teacher cache" if config.use_cache else "no teacher cache"
    if config.eval_tasks:
        yield f"without the time of the tasks {config.eval_tasks}"
    if config.early_stop_patience:
        yield "no early stop"
    if config.precompute:
        yield "the teacher is unloaded before the student loads, so only the larger of the two counts"


def _obstacles(facts: RunFacts) -> Iterator[str]:
    """Why a run will not fit."""
    yield from _memory_obstacles(facts)
    if facts.disk is not None:
        yield from _disk_obstacles(facts, facts.disk)


def _memory_obstacles(facts: RunFacts) -> Iterator[str]:
    needed, available, limit = sum(facts.peaks), facts.machine.usable_bytes, facts.config.worker_memory_limit_bytes
    if needed > available:
        yield f"needs {size(needed)} of memory, {size(available)} are there: it will not fit"
    if 0 < limit < facts.worker_peak:
        yield (
            f"the worker needs {size(facts.worker_peak)} of memory, worker_memory_limit_bytes allows {size(limit)}: "
            "it will not fit"
        )


def _disk_obstacles(facts: RunFacts, disk: DiskSpace) -> Iterator[str]:
    parts = {part.name: part.bytes for part in facts.disk_parts}
    cached = parts.pop(TEACHER_CACHE, 0)
    # A full cache gives up its oldest answers.
    needed = sum(parts.values()) + min(cached, max(0, disk.cache_limit_bytes - disk.cache_bytes))
    if needed > disk.free_bytes:
        yield (
            f"needs {size(needed)} on disk, {size(disk.free_bytes)} are free: it will not fit; free some, or save less "
            "with keep_last_n, save_best_only and use_cache"
        )
    if facts.config.precompute and cached > disk.cache_limit_bytes:
        yield (
            f"precompute keeps {size(cached)} of answers in the teacher cache, which takes "
            f"{size(disk.cache_limit_bytes)}: it will not fit; raise the limit (opd serve --cache-limit)"
        )


def _warnings(facts: RunFacts) -> Iterator[str]:
    needed, available = sum(facts.peaks), facts.machine.usable_bytes
    if TIGHT * available < needed <= available:
        yield f"needs {size(needed)} of the {size(available)} of memory there are: close other programs"


@dataclass(frozen=True, slots=True)
class Change:
    """Something a person could change, as words and as the facts it leads to."""

    words: str
    facts: RunFacts


def _advice(facts: RunFacts, rates: Rates) -> Iterator[str]:
    needed, seconds = sum(facts.peaks), sum(facts.seconds(rates).values())
    if needed > TIGHT * facts.machine.usable_bytes or any(_memory_obstacles(facts)):
        yield from _memory_advice(facts, needed)
    faster = []
    for change in _time_changes(facts):
        saved = 1 - sum(change.facts.seconds(rates).values()) / seconds
        if saved >= WORTH_SAVING:
            faster.append((saved, f"{change.words}: {100 * saved:.0f} % less time"))
    yield from (words for _, words in sorted(faster, reverse=True)[:2])


def _memory_advice(facts: RunFacts, needed: int) -> Iterator[str]:
    too_much = any(_obstacles(facts))
    found = []
    for change in _memory_changes(facts):
        after = sum(change.facts.peaks)
        if after < 0.99 * needed:
            fits = " (fits)" if too_much and not any(_obstacles(change.facts)) else ""
            found.append((after, f"{change.words}: {size(after)} instead of {size(needed)}{fits}"))
    yield from (words for _, words in sorted(found)[:SHOWN_ADVICE])


def _memory_changes(facts: RunFacts) -> Iterator[Change]:
    config = facts.config

    def changed(words: str, **values: object) -> Change:
        return Change(words, replace(facts, config=config.model_copy(update=values)))

    if not facts.student.bits:
        yield Change(
            "a student quantised to 4 bits (mlx_lm.convert -q)", replace(facts, student=_quantised(facts.student))
        )
    if not facts.teacher.bits:
        yield Change(
            "a teacher quantised to 4 bits (mlx_lm.convert -q)", replace(facts, teacher=_quantised(facts.teacher))
        )
    if facts.regime.on_policy == 0 and facts.regime.scores and not config.precompute:
        yield changed("precompute true", precompute=True)
    if config.backward != "layerwise":
        yield changed("backward layerwise", backward="layerwise")
    if config.batch_size > 1:
        steps = config.batch_size * config.gradient_accumulation_steps
        words = f"batch_size 1 with gradient_accumulation_steps {steps}, the same step"
        yield changed(words, batch_size=1, gradient_accumulation_steps=steps)
    if config.max_generation_tokens > 64:
        half = config.max_generation_tokens // 2
        yield changed(f"max_generation_tokens {half}", max_generation_tokens=half)
    yield from _fewer_held_out(facts)
    if config.lora.rank > 8 and not config.student_adapter_path:
        yield changed("lora.rank 8", lora=config.lora.model_copy(update={"rank": 8}))


def _time_changes(facts: RunFacts) -> Iterator[Change]:
    config = facts.config
    if config.max_generation_tokens > 64:
        half = config.max_generation_tokens // 2
        update = {"max_generation_tokens": half}
        yield Change(f"max_generation_tokens {half}", replace(facts, config=config.model_copy(update=update)))
    yield from _fewer_held_out(facts)
    if config.num_steps // config.eval_every > 2:
        wider = config.num_steps // 2
        yield Change(f"eval_every {wider}", replace(facts, config=config.model_copy(update={"eval_every": wider})))


def _fewer_held_out(facts: RunFacts) -> Iterator[Change]:
    if len(facts.lengths.held_out) > FEW_HELD_OUT:
        fewer = replace(facts, lengths=facts.lengths.evaluated(FEW_HELD_OUT))
        yield Change(f"max_validation_prompts {FEW_HELD_OUT}", fewer)


def _quantised(folder: ModelFolder) -> ModelFolder:
    """The same model with its matrices in four bits."""

    def smaller(name: str) -> bool:
        return name.endswith("weight") and len(folder.tensors[name].shape) > 1

    tensors = {
        name: replace(tensor, dtype="U8", bytes=int(tensor.bytes * QUANTISED_BITS / (8 * tensor.value_bytes)))
        if smaller(name)
        else tensor
        for name, tensor in folder.tensors.items()
    }
    return replace(folder, tensors=tensors)
