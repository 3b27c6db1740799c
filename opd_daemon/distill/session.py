"""A run inside its worker process: load the student, build the trainer's context, train, leave the final adapter."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_tokenizer

from opd_daemon.config import RunConfig
from opd_daemon.distill.chat import compare_templates
from opd_daemon.distill.checkpoints import Checkpoints
from opd_daemon.distill.data import PromptSet, build_prompts
from opd_daemon.distill.evaluation import Evaluator
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.live_preflight import check_models
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.loop import TrainingLoop
from opd_daemon.distill.memory import limited_memory
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.precompute import precompute
from opd_daemon.distill.step import StopRequested
from opd_daemon.distill.student import Student, load_tokenizer_of
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.distill.workload import STUDENT_DECODES, Regime
from opd_daemon.errors import OUT_OF_MEMORY_SIGNS, OpdError, Reason
from opd_daemon.home import RunFolders
from opd_daemon.memory_limit import lift_memory_limit
from opd_daemon.trainer import DivergenceInfo, Reporter, Teacher, TrainContext, TrainerInfo
from opd_daemon.vocabulary import compare_vocabularies, ids_below, load_vocabulary

logger = logging.getLogger(__name__)


def run_trainer(
    *,
    run_id: str,
    config: RunConfig,
    trainer: TrainerInfo,
    folders: RunFolders,
    teacher: Teacher,
    reporter: Reporter,
    should_stop: Callable[[], bool],
    resume_from: Path | None,
    memory_halvings: int = 0,
    divergences: Mapping[str, DivergenceInfo] | None = None,
) -> bool:
    """Train from the start, or from a step's checkpoint. True when the run is complete, false when it was stopped.

    memory_halvings: how many times to halve what is trained on, evaluated and decoded at once; the loss stays the
    same. divergences: those that plugins offer, by name.

    Raises:
        OpdError: with the reason of whatever went wrong; OUT_OF_MEMORY, of process "worker", when there was no memory
            here. What could be saved is saved then.
    """
    with limited_memory(config.worker_memory_limit_bytes), memory_faults_named(config), left_when_stopped(should_stop):
        tokenizer = load_tokenizer_of(Path(config.base_model_path))
        journal = Journal(reporter, folders, tokenizer.decode)
        unshared = unshared_ids(config, journal.log)
        masked = ids_below(unshared, teacher.info.vocab_size)
        prompts = read_prompts(config, tokenizer, teacher, journal)
        say_support(config, trainer, journal)
        if config.precompute:
            precompute(teacher, prompts, config, trainer=trainer, masked_token_ids=masked, journal=journal)
        student = load_student(config)
        mask_vocabulary(student, teacher, unshared)
        if memory_halvings:
            student.largest_batch = max(1, sampled_together(config, trainer) >> memory_halvings)
        head = cache(lambda: HeadMatrix(teacher.head(), student.vocabulary))
        loop = TrainingLoop(
            config=config,
            student=student,
            prompts=prompts,
            evaluator=Evaluator(
                teacher,
                student,
                prompts.held_out,
                config.model_copy(update={"batch_size": max(1, config.batch_size >> memory_halvings)}),
                masked_token_ids=masked,
                trainer=trainer,
                head=head,
            ),
            journal=journal,
            checkpoints=Checkpoints(folders.checkpoints, 1 if config.save_best_only else config.keep_last_n),
            should_stop=should_stop,
            resume_from=resume_from,
        )
        context = TrainContext(
            run_id=run_id,
            config=config,
            options=trainer.options.model_validate(config.trainer_options),
            folders=folders,
            teacher=teacher,
            student=student,
            prompts=prompts,
            objective=Objective.from_config(config, head=head, offered=divergences),
            loop=loop,
            reporter=reporter,
            should_stop=should_stop,
            resume_from=resume_from,
            masked_token_ids=masked,
            memory_halvings=memory_halvings,
        )
        reporter.started()
        if resume_from is None:
            check_models(teacher, student, loop.evaluator.rollouts, masked)
        return train(context, trainer)
    return False


@contextmanager
def left_when_stopped(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Leave quietly what a call to the teacher broke off because the run was asked to stop before its first step."""
    try:
        yield
    except OpdError as error:
        if error.reason is not Reason.CANCELLED or not should_stop():
            raise


@contextmanager
def memory_faults_named(config: RunConfig) -> Iterator[None]:
    """Turn what MLX and Python raise when memory ends into OUT_OF_MEMORY with the cure."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if is_memory_fault(fault):
            message = "not enough memory for a training step; resume with a smaller batch_size"
            raise OpdError(Reason.OUT_OF_MEMORY, message, batch_size=config.batch_size, process="worker") from fault
        raise


def is_memory_fault(fault: BaseException) -> bool:
    """Whether MLX or Python found no memory; MLX only says so in its message."""
    return isinstance(fault, MemoryError) or bool(OUT_OF_MEMORY_SIGNS.search(str(fault)))


def rescue(loop: TrainingLoop, fault: BaseException) -> None:
    """Save the last complete step with the memory that the failed work gives back; no more than tried."""
    lift_memory_limit()
    traceback.clear_frames(fault.__traceback__)
    gc.collect()
    mx.clear_cache()
    try:
        if loop.rescue():
            loop.journal.log(f"memory ran out; step {loop.progress.step} is saved", "warning")
    except Exception:
        logger.exception("no checkpoint could be written after memory ran out")


def train(context: TrainContext, trainer: TrainerInfo) -> bool:
    """Let the trainer train, and leave the final adapter. True when the run is complete, false when it was stopped."""
    loop, student = context.loop, context.student
    untouched = student.base_digest()
    try:
        trainer.factory().train(context)
    except StopRequested:
        loop.stop()
    except (RuntimeError, MemoryError) as fault:
        if is_memory_fault(fault):
            rescue(loop, fault)
        raise
    except OpdError as error:
        if error.reason is not Reason.CANCELLED or not context.should_stop():
            raise
        loop.stop()
    if student.base_digest() != untouched:
        raise OpdError(Reason.INTERNAL, "training changed the base model's weights; the adapter is not to be used")
    if not loop.stopped:
        loop.conclude()
    return not loop.stopped


def say_support(config: RunConfig, trainer: TrainerInfo, journal: Journal) -> None:
    """Say which completions bring no ids of the student's, though its ids are to carry the divergence."""
    others = set(trainer.sources(config, trainer.options.model_validate(config.trainer_options))) - {"student"}
    if config.signal == "sparse" and config.support != "teacher" and others:
        message = f"support {config.support}: completions the student didn't sample bring no ids of its own"
        journal.log(f"{message}; the teacher's top {config.top_k} carry the divergence there")


def sampled_together(config: RunConfig, trainer: TrainerInfo) -> int:
    """Most sequences that the student decodes at once."""
    step = config.batch_size * config.gradient_accumulation_steps
    return min(STUDENT_DECODES, max(config.max_eval_samples, step * (1 + Regime.of(config, trainer).staleness)))


def load_student(config: RunConfig) -> Student:
    """The run's student. On a CPU the base is cast to float32, the only type it multiplies fast."""
    adapter = Path(config.student_adapter_path) if config.student_adapter_path else None
    float32 = on_host() or not config.mixed_precision
    return Student.load(Path(config.base_model_path), adapter, config.lora, seed=config.seed, float32=float32)


def read_prompts(config: RunConfig, tokenizer: Any, teacher: Teacher, journal: Journal) -> PromptSet:
    """The run's prompts as each model reads them; says what is left out, and where the models' templates differ."""
    own = load_tokenizer(Path(config.teacher_model_path)) if config.teacher_template == "teacher" else None
    prompts = build_prompts(config, tokenizer, sorted(tokenizer.eos_token_ids), teacher.info.max_context, own)
    if prompts.left_out:
        journal.log(f"{prompts.left_out} training prompts are held out too, and left out of training", "warning")
    differs = compare_templates(Path(config.base_model_path), Path(config.teacher_model_path))
    if differs and own is None:
        cure = "the teacher reads the student's rendering; teacher_template: teacher lets it read its own"
        journal.log(f"the models' chat templates render a prompt differently ({differs}): {cure}", "warning")
    elif differs:
        journal.log(f"the teacher reads prompts as its own chat template renders them ({differs})")
    return prompts


def unshared_ids(config: RunConfig, say: Callable[[str], None]) -> tuple[int, ...]:
    """Ids that only one of the two tokenizers knows, which get no mass on either side; says so.

    Raises:
        OpdError: TOKENIZER_MISMATCH naming the first ids that mean different tokens.
    """
    match = compare_vocabularies(
        load_vocabulary(Path(config.teacher_model_path)), load_vocabulary(Path(config.base_model_path))
    )
    if not match.compatible:
        shown = ", ".join(f"{index}: {ours!r} / {theirs!r}" for index, ours, theirs in match.disagreements)
        message = f"teacher and student give the same ids to different tokens ({shown}); they need one tokenizer"
        raise OpdError(Reason.TOKENIZER_MISMATCH, message)
    if match.unshared:
        say(f"{len(match.unshared)} ids that only one of the two tokenizers knows are masked on both sides")
    return match.unshared


def mask_vocabulary(student: Student, teacher: Teacher, unshared: tuple[int, ...]) -> None:
    """Leave the student no mass on ids the teacher doesn't know, and as many logits as the teacher has."""
    info = teacher.info
    student.mask_vocabulary((*unshared, *range(info.vocab_size, student.width)), info.padded_vocab_size)
