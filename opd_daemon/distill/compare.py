"""Several models of a run answer the same prompts: what they say, how fast, in how much memory, how like the teacher.

Every model answers one prompt at a time, after a short warm-up that isn't counted. The base is loaded once; each
adapter is put on it and taken off again, so that every model is exactly as mlx-lm would run it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_tokenizer

from opd_daemon.config import RunConfig
from opd_daemon.distill.adapter import AdapterConfig, read_adapter_config, weights_file
from opd_daemon.distill.confidence import summarise
from opd_daemon.distill.data import Prompt, Row, TeacherReader, tokenise
from opd_daemon.distill.logits import on_host
from opd_daemon.distill.memory import limit_memory
from opd_daemon.distill.rollouts import Rollout, teacher_completions
from opd_daemon.distill.session import mask_vocabulary, unshared_ids
from opd_daemon.distill.shape import in_float32, shape_of
from opd_daemon.distill.student import Student, load_base
from opd_daemon.distill.tokenwise import Tokenwise
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import read_folder
from opd_daemon.textstream import TextStream
from opd_daemon.trainer import Teacher
from opd_daemon.types import ComparisonRequest, GenerateRequest, ModelAnswer, ModelSummary
from opd_daemon.vocabulary import ids_below

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 4
NO_ADAPTER = AdapterConfig("lora", 0, 0, 0.0, 0.0, None)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of an answer as they come, the text they complete, and "stop" or "length" with the last of them."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""


Answering = Callable[[GenerateRequest], Iterator[Piece]]
Report = Callable[[ModelAnswer], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answered: one rollout a prompt, and the time all of it took."""

    rollouts: tuple[Rollout, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(len(rollout.completion_ids) for rollout in self.rollouts)


class Comparison:
    """One comparison, told piece by piece.

    adapters: folder of the adapter by model, for "sft" and "distilled". teacher: scores; `speak` lets it answer one
    prompt as tokens come, never from a cache.
    """

    def __init__(
        self,
        request: ComparisonRequest,
        *,
        config: RunConfig,
        adapters: dict[str, Path],
        teacher: Teacher,
        speak: Answering,
        report: Report,
    ) -> None:
        limit_memory(config.worker_memory_limit_bytes)
        self._request = request
        self._config = config
        self._adapters = adapters
        self._teacher = teacher
        self._speak = speak
        self._report = report
        self._wardrobe = Wardrobe(config)
        self._max_tokens = request.max_tokens or config.max_generation_tokens
        self._prompts = self._tokenised()
        self._unshared = unshared_ids(config, logger.info)
        # No student could be asked about ids that only the teacher knows, so it says none of them here either.
        self._masked = ids_below(self._unshared, teacher.info.vocab_size)

    def run(self) -> None:
        """Let the teacher answer first, as the others are compared on its completions; then each student."""
        names = self._request.models
        reference = self._teacher_answers(asked="teacher" in names)
        for name in names:
            if name != "teacher":
                self._student_answers(name, reference, speeds="teacher" in names)

    def _tokenised(self) -> list[Prompt]:
        config, tokenizer = self._config, self._wardrobe.tokenizer
        own = load_tokenizer(Path(config.teacher_model_path)) if config.teacher_template == "teacher" else None
        reader = TeacherReader(config.teacher_system_prompt, own)
        prompts = []
        for index, text in enumerate(self._request.prompts):
            row = Row(f"prompts[{index}]", ({"role": "user", "content": text},))
            prompt = tokenise(row, index, tokenizer, tuple(sorted(tokenizer.eos_token_ids)), reader)
            length = max(len(prompt.token_ids), len(prompt.teacher_token_ids)) + self._max_tokens
            if length > self._teacher.info.max_context:
                limit = f"the teacher's context has {self._teacher.info.max_context}"
                message = f"{row.place}: {length} tokens with max_tokens {self._max_tokens}; {limit}"
                raise OpdError(Reason.INVALID_REQUEST, message, tokens=length)
            prompts.append(prompt)
        return prompts

    def _teacher_answers(self, *, asked: bool) -> Answers:
        if not asked:
            rollouts = teacher_completions(
                self._teacher,
                self._prompts,
                max_tokens=self._max_tokens,
                temperature=self._request.temperature,
                seed=self._config.seed,
                masked_token_ids=self._masked,
            )
            return Answers(tuple(rollouts), 0.0)
        answers = self._answers("teacher", self._speak)
        weights = self._teacher.info.weight_bytes
        summary = ModelSummary(answers.tokens, answers.seconds, weights, speedup=1.0)
        self._report(ModelAnswer("teacher", summary=summary))
        return answers

    def _student_answers(self, name: str, reference: Answers, *, speeds: bool) -> None:
        with self._wardrobe.wearing(self._adapters.get(name)) as student:
            mask_vocabulary(student, self._teacher, self._unshared)
            answers = self._answers(name, lambda request: student_pieces(student, request))
            summary = ModelSummary(
                answers.tokens,
                answers.seconds,
                weight_bytes=_bytes(student.model.parameters()),
                adapter_bytes=_bytes(student.parameters_tree()),
                peak_bytes=mx.get_peak_memory(),
            )
            if speeds and reference.seconds and answers.seconds:
                teacher_speed = reference.tokens / reference.seconds
                summary = replace(summary, speedup=summary.tokens_per_second / teacher_speed)
            self._report(ModelAnswer(name, summary=self._likeness(summary, student, reference)))

    def _answers(self, name: str, answering: Answering) -> Answers:
        for _ in answering(self._generation(self._prompts[0], name, WARM_UP_TOKENS)):
            pass
        mx.reset_peak_memory()
        rollouts, seconds = [], 0.0
        for prompt in self._prompts:
            tokens: list[int] = []
            reason = ""
            started = time.perf_counter()
            for piece in answering(self._generation(prompt, name, self._max_tokens)):
                tokens += piece.token_ids
                reason = piece.finish_reason
                self._report(ModelAnswer(name, prompt.index, piece.text, len(piece.token_ids), reason))
            seconds += time.perf_counter() - started
            stopped: Any = "stop" if reason == "stop" else "length"
            rollouts.append(Rollout(prompt, tuple(tokens), stopped, "teacher" if name == "teacher" else "student"))
        return Answers(tuple(rollouts), seconds)

    def _generation(self, prompt: Prompt, name: str, max_tokens: int) -> GenerateRequest:
        seed = (self._config.seed + prompt.index) % 2**32
        temperature = self._request.temperature
        if name != "teacher":
            return GenerateRequest(prompt.token_ids, max_tokens, temperature, seed=seed)
        return GenerateRequest(
            prompt.teacher_token_ids, max_tokens, temperature, seed=seed, masked_token_ids=self._masked
        )

    def _likeness(self, summary: ModelSummary, student: Student, reference: Answers) -> ModelSummary:
        """The summary with what sets the student apart from the teacher, on the teacher's completions."""
        tokenwise = Tokenwise(self._teacher, student, self._config, self._masked)
        found = summarise(tokenwise.compare(reference.rollouts))
        if not tokenwise.exact:  # the rest would be bounds, not values
            return replace(summary, agreement=found.agreement)
        return replace(
            summary,
            forward_kl=found.forward_kl,
            reverse_kl=found.reverse_kl,
            agreement=found.agreement,
            acceptance=found.acceptance,
        )


class Wardrobe:
    """The run's base model, and adapters that it wears one after another."""

    def __init__(self, config: RunConfig) -> None:
        path = Path(config.base_model_path)
        float32 = on_host() or not config.mixed_precision
        self.model, self.tokenizer = load_base(path, float32=float32)
        folder = read_folder(path)
        self._shape = shape_of(in_float32(folder) if float32 else folder)

    @contextmanager
    def wearing(self, adapter: Path | None) -> Iterator[Student]:
        """The model with an adapter, None for the base as it is. Raises INVALID_RUN_CONFIG when it doesn't fit."""
        bare = dict(self.model.named_modules())
        config = read_adapter_config(adapter) if adapter else NO_ADAPTER
        if adapter:
            dora = config.fine_tune_type == "dora"
            linear_to_lora_layers(self.model, config.num_layers, config.lora_parameters, use_dora=dora)
        try:
            student = Student(self.model, self.tokenizer, config, self._shape)
            if adapter:
                student.load_adapter(weights_file(adapter))
            self.model.eval()
            mx.eval(self.model.parameters())
            yield student
        finally:
            now = self.model.named_modules()
            self.model.update_modules(
                tree_unflatten([(name, bare[name]) for name, module in now if bare.get(name, module) is not module])
            )
            mx.clear_cache()


class Decoding:
    """A student as mlx-lm's generator sees it; a token is decoded as it is in a run."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T)."""
        return self._student.decoder(tokens, cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student.model, name)


def student_pieces(student: Student, request: GenerateRequest) -> Iterator[Piece]:
    """A student's answer to one prompt, token by token, as mlx-lm generates it."""
    mx.random.seed(request.seed or 0)
    text = TextStream(student.tokenizer.decode, student.eos_ids)
    steps = generate_step(
        mx.array(request.prompt_ids),
        Decoding(student),
        max_tokens=request.max_tokens,
        sampler=make_sampler(temp=request.temperature),
        # Real ids only; a model whose head is padded could say others.
        logits_processors=[lambda _, logits: student.vocabulary(logits)],
    )
    for made, (token, _) in enumerate(steps, start=1):
        stopped = int(token) in student.eos_ids
        reason = "stop" if stopped else "length" if made == request.max_tokens else ""
        yield Piece((int(token),), text.add(int(token), last=bool(reason)), reason)
        if stopped:
            return


def _bytes(tree: Any) -> int:
    weights: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return sum(array.nbytes for _, array in weights)
