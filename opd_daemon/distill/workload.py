"""What a run computes, phase by phase, in sequences and tokens: the part of a plan no machine changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from opd_daemon.config import RunConfig
from opd_daemon.distill.data import Prompt, Row, TeacherReader, load_tokenizer, split_rows, tokenise
from opd_daemon.models.folder import read_folder

if TYPE_CHECKING:
    from opd_daemon.trainer import TrainerInfo

Kind = Literal["sample", "write", "score", "learn", "update", "compare"]
Phase = Literal["load", "rollout", "score", "train", "evaluate", "checkpoint", "report"]

PHASES: tuple[Phase, ...] = ("load", "rollout", "score", "train", "evaluate", "checkpoint", "report")

# Prompts that are tokenised to learn how long they are.
SAMPLED_ROWS = 128
SIMULATED_STEPS = 16
# Micro-batches are padded to multiples of this, or to eighths of an octave where those are wider.
LENGTH_MULTIPLE, BUCKETS_PER_OCTAVE = 16, 8
# Sequences decoded at once, by the student and by the teacher: more cost more key-value memory than they save time.
STUDENT_DECODES, TEACHER_DECODES = 64, 32
# Held-out prompts whose answers are shown.
SHOWN_ANSWERS = 4
# What both models are checked on before training: completions of the teacher, and so many tokens of the student.
CHECKED, CHECKED_TOKENS = 4, 12
# What sequences begin with, as the words of a chat template, is computed once for all where that saves so much.
SHARING_WORTH = 1 / 8


@dataclass(frozen=True, slots=True)
class Forward:
    """A batch through a model: `sequences` padded to `length` tokens, `rows` of them through the head."""

    sequences: float
    length: float
    rows: float

    @property
    def tokens(self) -> float:
        """Positions, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class Decode:
    """`sequences` continued together by `tokens` each, behind prompts of which `prompts` differ."""

    sequences: float
    prompt: float
    tokens: float
    prompts: float


@dataclass(frozen=True, slots=True)
class Update:
    """An optimizer update of `micro_batches` accumulated gradients."""

    micro_batches: float


Item = Forward | Decode | Update


@dataclass(frozen=True, slots=True)
class Task:
    """Something the run does `count` times, in a phase."""

    phase: Phase
    kind: Kind
    item: Item
    count: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Tokens of the prompts, training and held out, and of the data's own completions, EOS included; 0 where none.

    teacher_train, teacher_held_out: of the same prompts as the teacher reads them. shared, held_out_shared: tokens
    all of these begin with.
    """

    train: tuple[int, ...]
    completions: tuple[int, ...]
    held_out: tuple[int, ...]
    teacher_train: tuple[int, ...]
    teacher_held_out: tuple[int, ...]
    train_count: int
    shared: int = 0
    held_out_shared: int = 0

    @property
    def longest(self) -> int:
        """The longest prompt the student reads."""
        return max((*self.train, *self.held_out))

    @property
    def teacher_longest(self) -> int:
        """The longest prompt the teacher reads."""
        return max((*self.teacher_train, *self.teacher_held_out))

    def evaluated(self, count: int) -> Lengths:
        """The same with so many held-out prompts."""
        return replace(self, held_out=self.held_out[:count], teacher_held_out=self.teacher_held_out[:count])


def measure_lengths(config: RunConfig) -> Lengths:
    """Tokenise rows of a run as the run will, evenly chosen ones where there are many.

    Raises:
        OpdError: INVALID_RUN_CONFIG for faulty rows, MODEL_NOT_FOUND for a folder that can't be read.
    """
    train, held_out = split_rows(config)
    folder = read_folder(Path(config.base_model_path))
    tokenizer = load_tokenizer(folder.path)
    own = load_tokenizer(Path(config.teacher_model_path)) if config.teacher_template == "teacher" else None
    reader = TeacherReader(config.teacher_system_prompt, own)

    def sampled(rows: Sequence[Row]) -> list[Prompt]:
        chosen = _evenly(rows, SAMPLED_ROWS)
        return [tokenise(row, 0, tokenizer, folder.eos_token_ids or (0,), reader) for row in chosen]

    prompts, others = sampled(train), sampled(held_out)
    repeated = [others[place % len(others)] for place in range(len(held_out))]
    return Lengths(
        train=tuple(len(prompt.token_ids) for prompt in prompts),
        completions=tuple(min(len(prompt.reference_ids or ()), config.max_generation_tokens) for prompt in prompts),
        held_out=tuple(len(prompt.token_ids) for prompt in repeated),
        teacher_train=tuple(len(prompt.teacher_token_ids) for prompt in prompts),
        teacher_held_out=tuple(len(prompt.teacher_token_ids) for prompt in repeated),
        train_count=len(train),
        shared=_shared(prompts),
        held_out_shared=_shared(others),
    )


def _shared(prompts: Sequence[Prompt]) -> int:
    """Tokens that all of them begin with, as the teacher reads them."""
    columns = zip(*(prompt.teacher_token_ids for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _evenly(rows: Sequence[Row], count: int) -> list[Row]:
    step = max(1.0, len(rows) / count)
    return [rows[int(place * step)] for place in range(min(count, len(rows)))]


@dataclass(frozen=True, slots=True)
class Regime:
    """Whose completions are trained on, and what they cost.

    on_policy: share of steps whose completions the student samples. writes: the others are written by the teacher
    rather than given. scores: the teacher scores them. samples_per_prompt, prefix_tokens, staleness: as the
    trainer's options.
    """

    on_policy: float
    writes: bool
    scores: bool
    samples_per_prompt: int = 1
    prefix_tokens: int = 0
    staleness: int = 0

    @classmethod
    def of(cls, config: RunConfig, trainer: TrainerInfo) -> Regime:
        """The regime of a trainer with the options it is given."""
        options = trainer.options.model_validate(config.trainer_options)
        sources = trainer.sources(config, options)
        return cls(
            on_policy=sources.get("student", 0.0),
            writes=sources.get("teacher", 0.0) > 0,
            # The numbers watched beside the loss need the teacher's answers too, so a kl_weight of 0 saves none.
            scores=trainer.uses_teacher,
            samples_per_prompt=int(getattr(options, "samples_per_prompt", 1)),
            prefix_tokens=int(getattr(options, "prefix_tokens", 0)),
            staleness=int(getattr(options, "staleness", 0)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Everything a run does. largest: the micro-batch that takes the most memory.

    context: the longest sequence of the student; teacher_context: of the teacher.
    """

    config: RunConfig
    regime: Regime
    lengths: Lengths
    tasks: tuple[Task, ...]
    largest: Forward
    context: int
    teacher_context: int

    @property
    def step_sequences(self) -> int:
        """Sequences in an optimizer step."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def sampled_sequences(self) -> int:
        """Sequences the student samples at once."""
        return min(STUDENT_DECODES, self.step_sequences * (1 + self.regime.staleness)) if self.regime.on_policy else 0


def workload_of(config: RunConfig, regime: Regime, lengths: Lengths) -> Workload:
    """Work out a run's tasks. Completions are taken to be as long as they may be, those of the data as they are."""
    given = regime.on_policy == 0 and not regime.writes and any(lengths.completions)
    trained = [length or config.max_generation_tokens for length in lengths.completions]
    if not given:
        trained = [config.max_generation_tokens] * len(lengths.train)
    if regime.prefix_tokens:
        trained = [min(length, regime.prefix_tokens) for length in trained]
    pairs = list(zip(lengths.train, trained, strict=True))
    batches = _micro_batches(config, regime, pairs)
    widest = _padded(max(prompt + completion for prompt, completion in pairs))
    largest = _largest(config, pairs)
    tasks = (
        *_rollouts(config, regime, lengths),
        *_scoring(config, regime, lengths, trained),
        *(Task("train", "learn", batch, config.num_steps / SIMULATED_STEPS) for batch in batches),
        Task("train", "update", Update(len(batches) / SIMULATED_STEPS), config.num_steps),
        *_evaluation(config, lengths),
    )
    context = max(lengths.longest + config.max_generation_tokens, widest)
    teacher_context = max(lengths.teacher_longest + config.max_generation_tokens, context)
    return Workload(config, regime, lengths, tasks, largest, context, teacher_context)


def _micro_batches(config: RunConfig, regime: Regime, pairs: list[tuple[int, int]]) -> list[Forward]:
    """Those of a few simulated steps: drawn prompts, sequences of like length together."""
    drawn = np.random.default_rng(0)
    size, per_prompt = config.batch_size * config.gradient_accumulation_steps, regime.samples_per_prompt
    batches = []
    for _ in range(SIMULATED_STEPS):
        places = np.repeat(drawn.integers(0, len(pairs), max(1, size // per_prompt)), per_prompt)
        ordered = sorted((pairs[place] for place in places), key=sum)
        while ordered:
            count = _fitting(config, [prompt + completion for prompt, completion in ordered])
            part, ordered = ordered[:count], ordered[count:]
            width = _padded(max(prompt + completion for prompt, completion in part))
            batches.append(Forward(len(part), width, sum(completion for _, completion in part)))
    return batches


def _largest(config: RunConfig, pairs: list[tuple[int, int]]) -> Forward:
    """The micro-batch that takes the most memory."""
    longest: dict[int, int] = {}  # completion by padded width
    for prompt, completion in pairs:
        width = _padded(prompt + completion)
        longest[width] = max(longest.get(width, 0), completion)
    batches = [
        Forward(count, width, count * completion)
        for width, completion in longest.items()
        if (count := _fitting(config, [width] * config.batch_size))
    ]
    return max(batches, key=lambda batch: (batch.sequences * batch.length, batch.rows))


def _fitting(config: RunConfig, lengths: list[int]) -> int:
    """How many of these sequences, in order of length, go into a micro-batch."""
    count = min(config.batch_size, len(lengths))
    while config.max_batch_tokens and count > 1 and count * _padded(lengths[count - 1]) > config.max_batch_tokens:
        count -= 1
    return count


def _rollouts(config: RunConfig, regime: Regime, lengths: Lengths) -> list[Task]:
    size = config.batch_size * config.gradient_accumulation_steps
    prompt, tokens = float(np.mean(lengths.train)), config.max_generation_tokens
    tasks = []
    if regime.on_policy:
        tokens = min(tokens, regime.prefix_tokens or tokens)
        steps = 1 + regime.staleness  # whose completions are sampled together
        calls = -(-size * steps // STUDENT_DECODES)
        together = size * steps / calls
        item = Decode(together, prompt, tokens, together / regime.samples_per_prompt)
        tasks.append(Task("rollout", "sample", item, regime.on_policy * config.num_steps * calls / steps))
    if regime.on_policy < 1 and regime.writes:
        distinct = min(lengths.train_count, (1 - regime.on_policy) * config.num_steps * size)
        together = min(TEACHER_DECODES, distinct)
        read = float(np.mean(lengths.teacher_train))
        tasks.append(Task("rollout", "write", Decode(together, read, tokens, together), distinct / together))
    return tasks


def _scoring(config: RunConfig, regime: Regime, lengths: Lengths, trained: list[int]) -> list[Task]:
    if not regime.scores:
        return []
    size = config.batch_size * config.gradient_accumulation_steps
    sequences = config.num_steps * size
    fresh = regime.on_policy * sequences
    others = sequences - fresh
    # A completion that doesn't depend on the student is scored once and then found in the cache.
    fresh += min(others, lengths.train_count) if config.use_cache else others
    prompt = float(np.mean(lengths.teacher_train))
    rows = float(np.mean(trained))
    if regime.samples_per_prompt > 1:  # what they begin with is computed once
        length = rows + prompt / regime.samples_per_prompt
    else:
        length = _computed(prompt + rows, lengths.shared, size)
    return [Task("score", "score", Forward(size, length, size * rows), fresh / size)]


def _computed(length: float, shared: int, sequences: float) -> float:
    """Tokens of each of some sequences that the teacher computes, where all begin with the same `shared` ones."""
    saved = shared * (1 - 1 / sequences)
    return length - saved if saved >= SHARING_WORTH * length else length


def _evaluation(config: RunConfig, lengths: Lengths) -> list[Task]:
    count, tokens = len(lengths.held_out), config.max_generation_tokens
    times = config.num_steps // config.eval_every + 1 + (config.num_steps % config.eval_every > 0)
    prompt, read = float(np.mean(lengths.held_out)), float(np.mean(lengths.teacher_held_out))
    together = min(TEACHER_DECODES, count)
    batches = -(-count // config.batch_size)
    size = count / batches
    width = _padded(prompt + tokens)
    compared = Forward(size, width, size * tokens)

    def scored(sequences: float) -> Forward:
        length = _computed(read + tokens, lengths.held_out_shared, sequences)
        return Forward(sequences, length, sequences * tokens)

    tasks = [
        Task("evaluate", "write", Decode(together, read, tokens, together), count / together),
        # From the second time on the cache has the answers.
        Task("evaluate", "score", scored(size), batches if config.use_cache else batches * times),
        Task("evaluate", "compare", compared, batches * times),
        Task("evaluate", "sample", Decode(min(SHOWN_ANSWERS, count), prompt, tokens, min(SHOWN_ANSWERS, count)), 2),
    ]
    checked, few = min(CHECKED, count), min(tokens, CHECKED_TOKENS)
    tasks += [
        Task("evaluate", "score", scored(checked)),
        Task("evaluate", "sample", Decode(checked, prompt, few, checked)),
        Task("evaluate", "compare", Forward(checked, _padded(prompt + few), checked * few)),
    ]
    if own := own_samples(config, lengths):
        batches = -(-own // config.batch_size)
        size = own / batches
        tasks += [
            Task("evaluate", "sample", Decode(own, prompt, tokens, own), times),
            Task("evaluate", "score", scored(size), batches * times),
            Task("evaluate", "compare", Forward(size, width, size * tokens), batches * times),
        ]
    return tasks


def own_samples(config: RunConfig, lengths: Lengths) -> int:
    """Held-out prompts evaluated on the student's own samples, which nobody is there to score after precomputing."""
    return 0 if config.precompute else min(config.max_eval_samples, len(lengths.held_out))


def _padded(length: float) -> int:
    """The width a micro-batch with a longest sequence of so many tokens is padded to."""
    multiple = max(LENGTH_MULTIPLE, (1 << int(length).bit_length() - 1) // BUCKETS_PER_OCTAVE)
    return int(-(-length // multiple) * multiple)
