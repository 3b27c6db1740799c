"""A run inside its worker process: load the student, build the trainer's context, train, leave the final adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_daemon.config import RunConfig
from opd_daemon.distill.checkpoints import Checkpoints
from opd_daemon.distill.data import build_prompts
from opd_daemon.distill.evaluation import Evaluator
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.loop import TrainingLoop
from opd_daemon.distill.memory import limit_memory
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.step import StopRequested
from opd_daemon.distill.student import Student
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import RunFolders
from opd_daemon.trainer import Reporter, Teacher, TrainContext, TrainerInfo
from opd_daemon.vocabulary import compare_vocabularies, load_vocabulary

OUT_OF_MEMORY = re.compile(r"malloc|unable to allocate|out of memory|insufficient memory|bad_alloc", re.IGNORECASE)


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
) -> bool:
    """Train from the start, or from a step's checkpoint. True when the run is complete, false when it was stopped.

    Raises:
        OpdError: with the reason of whatever went wrong; OUT_OF_MEMORY when MLX could not allocate.
    """
    limit_memory()
    with memory_faults_named(config):
        student = load_student(config)
        journal = Journal(reporter, folders, student.tokenizer.decode)
        masked = mask_unshared(config, teacher, student, journal)
        prompts = build_prompts(config, student.tokenizer, student.eos_ids, teacher.info.max_context)
        loop = TrainingLoop(
            config=config,
            student=student,
            prompts=prompts,
            evaluator=Evaluator(teacher, student, prompts.held_out, config, masked),
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
            objective=Objective.from_config(config),
            loop=loop,
            reporter=reporter,
            should_stop=should_stop,
            resume_from=resume_from,
            masked_token_ids=masked,
        )
        reporter.started()
        return train(context, trainer)


@contextmanager
def memory_faults_named(config: RunConfig) -> Iterator[None]:
    """Turn what MLX and Python raise when memory ends into OUT_OF_MEMORY with the cure."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if isinstance(fault, MemoryError) or OUT_OF_MEMORY.search(str(fault)):
            message = "not enough memory for a training step; resume with a smaller batch_size"
            raise OpdError(Reason.OUT_OF_MEMORY, message, batch_size=config.batch_size) from fault
        raise


def train(context: TrainContext, trainer: TrainerInfo) -> bool:
    """Let the trainer train, and leave the final adapter. True when the run is complete, false when it was stopped."""
    loop, student = context.loop, context.student
    untouched = student.base_digest()
    try:
        trainer.factory().train(context)
    except StopRequested:
        loop.stop()
    except OpdError as error:
        if error.reason is not Reason.CANCELLED or not context.should_stop():
            raise
        loop.stop()
    if student.base_digest() != untouched:
        raise OpdError(Reason.INTERNAL, "training changed the base model's weights; the adapter is not to be used")
    if not loop.stopped:
        loop.conclude()
    return not loop.stopped


def load_student(config: RunConfig) -> Student:
    """The run's student. On a CPU the base is cast to float32, the only type it multiplies fast."""
    adapter = Path(config.student_adapter_path) if config.student_adapter_path else None
    float32 = on_host() or not config.mixed_precision
    return Student.load(Path(config.base_model_path), adapter, config.lora, seed=config.seed, float32=float32)


def mask_unshared(config: RunConfig, teacher: Teacher, student: Student, journal: Journal) -> tuple[int, ...]:
    """Give ids that only one model knows no mass on either side, and say so. Returns those the teacher has to mask.

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
    unshared = (*match.only_teacher, *match.only_student)
    info = teacher.info
    student.mask_vocabulary((*unshared, *range(info.vocab_size, student.width)), info.padded_vocab_size)
    if unshared:
        journal.log(f"{len(unshared)} ids that only one of the two tokenizers knows are masked on both sides")
    return tuple(index for index in unshared if index < info.vocab_size)
