"""A first estimate of what a run takes, from configurations and file sizes alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from opd_daemon.config import RunConfig
from opd_daemon.distill.data import split_rows
from opd_daemon.distill.model_folder import ModelFolder, read_model_folder
from opd_daemon.types import Plan

GIB = 1 << 30
TEMPLATE_TOKENS = 20
BYTES_PER_TOKEN = 4
PROCESS_BYTES = GIB // 2
CACHE_BYTES = 2 * GIB

# Logits of one chunk of rows; about eight times as much is alive while a chunk is worked on.
CHUNK_BYTES = 32 << 20

# A forward whose graph is kept for the backward holds this many hidden-sized float32 arrays per layer and token
# (measured with LoRA on every linear layer); above the limit, a second forward is cheaper than the memory.
KEPT_ARRAYS = 114
KEPT_BYTES = 3 * GIB


@dataclass(frozen=True, slots=True)
class Machine:
    """Assumed rates: matrix products in FLOP/s, reading weights in bytes/s."""

    name: str
    flops: float
    bandwidth: float
    float32_only: bool


def this_machine() -> Machine:
    """Typical rates of machines like this one."""
    if sys.platform == "darwin":
        return Machine("Apple silicon", 8e12, 2.5e11, float32_only=False)
    cores = psutil.cpu_count(logical=False) or 1
    return Machine(f"a CPU with {cores} cores", 3e10 * cores, 8e9, float32_only=True)


def estimate(config: RunConfig, teacher_loaded: bool) -> Plan:
    """Seconds, peak memory and disk of a run that has passed `check_run`.

    teacher_loaded: the teacher's memory is already in use, so the machine's free memory leaves it out.
    """
    student, teacher = (read_model_folder(Path(path)) for path in (config.base_model_path, config.teacher_model_path))
    machine = this_machine()
    train, held_out = split_rows(config)
    prompt_bytes = sum(len(row.prompt.encode()) for row in train) / len(train)
    length = TEMPLATE_TOKENS + prompt_bytes / BYTES_PER_TOKEN + config.max_generation_tokens
    weights = _loaded_bytes(config, student, machine)
    seconds = config.num_steps * _step_seconds(config, student, teacher, machine, length)
    seconds += _evaluation_seconds(config, student, teacher, machine, length * len(held_out))
    daemon, worker = _daemon_bytes(teacher), _worker_bytes(config, student, teacher, length) + weights
    available = psutil.virtual_memory().available + (teacher.weight_bytes if teacher_loaded else 0)
    peak = daemon + worker
    warnings = []
    if peak > available:
        cure = "use quantised models, a smaller batch_size or fewer max_generation_tokens"
        warnings.append(f"needs about {peak / GIB:.1f} GiB, {available / GIB:.1f} GiB are free; {cure}")
    return Plan(
        seconds=seconds,
        daemon_peak_bytes=daemon,
        worker_peak_bytes=worker,
        disk_bytes=_disk_bytes(config, student, length),
        available_bytes=available,
        assumptions=(
            f"{machine.name}: {machine.flops / 1e12:.2g} TFLOP/s, weights read at {machine.bandwidth / 1e9:.0f} GB/s",
            f"prompts of {length - config.max_generation_tokens:.0f} tokens, every completion of full length",
            "nothing in the teacher cache",
        ),
        warnings=tuple(warnings),
    )


def lora_parameters(config: RunConfig, student: ModelFolder) -> int:
    """Weights of a fresh adapter on every linear layer of the adapted blocks."""
    layers = student.number("num_hidden_layers", 1)
    hidden = student.number("hidden_size", 1)
    inner = student.number("intermediate_size", 4 * hidden)
    adapted = layers if config.lora.num_layers < 0 else min(config.lora.num_layers, layers)
    return adapted * config.lora.rank * (8 * hidden + 3 * (hidden + inner))


def _step_seconds(
    config: RunConfig, student: ModelFolder, teacher: ModelFolder, machine: Machine, length: float
) -> float:
    sequences = config.batch_size * config.gradient_accumulation_steps
    tokens = sequences * length
    read = _loaded_bytes(config, student, machine) / machine.bandwidth
    sample = config.max_generation_tokens * max(read, 2 * student.parameters * sequences / machine.flops)
    score = 2 * teacher.parameters * tokens / machine.flops
    train = 6 * student.parameters * tokens / machine.flops
    return sample + score + train


def _evaluation_seconds(
    config: RunConfig, student: ModelFolder, teacher: ModelFolder, machine: Machine, tokens: float
) -> float:
    evaluations = config.num_steps // config.eval_every + 2
    return evaluations * 2 * (student.parameters + teacher.parameters) * tokens / machine.flops


def _loaded_bytes(config: RunConfig, model: ModelFolder, machine: Machine) -> int:
    if model.bits:
        return model.weight_bytes
    return 4 * model.parameters if machine.float32_only or not config.mixed_precision else model.weight_bytes


def _daemon_bytes(teacher: ModelFolder) -> int:
    return teacher.weight_bytes + CACHE_BYTES // 2 + PROCESS_BYTES


def _worker_bytes(config: RunConfig, student: ModelFolder, teacher: ModelFolder, length: float) -> int:
    adapter = 4 * 4 * lora_parameters(config, student)  # weights, gradients and two moments in float32
    shape = student.number("num_hidden_layers", 1) * student.number("hidden_size", 1)
    activations = min(KEPT_BYTES, int(config.batch_size * length * shape * KEPT_ARRAYS * 4))
    head = teacher.number("vocab_size") * teacher.number("hidden_size") * 2
    return adapter + activations + head + 8 * CHUNK_BYTES + CACHE_BYTES + PROCESS_BYTES


def _disk_bytes(config: RunConfig, student: ModelFolder, length: float) -> int:
    adapter = 4 * lora_parameters(config, student)
    checkpoints = (3 * config.keep_last_n + 2) * adapter
    rollouts = config.num_steps * config.batch_size * config.gradient_accumulation_steps * length * 12
    return int(checkpoints + rollouts)
