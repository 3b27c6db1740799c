"""The run configuration, its presets and its YAML form.

Field names, defaults and presets are part of the contract: the same names are used in YAML files, in
`CreateRunRequest.config` and in `opd distill --set name=value`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from opd_daemon.errors import FieldViolation, OpdError, Reason, violations_error
from opd_daemon.home import user_path
from opd_daemon.names import RULE, is_identifier


def _identifier(value: str) -> str:
    if value and not is_identifier(value):
        raise ValueError(f"use {RULE}")
    return value


def _path(value: str) -> str:
    if any(ord(character) < 32 for character in value):
        raise ValueError("holds a control character; name another path")
    return value


Identifier = Annotated[str, AfterValidator(_identifier)]
PathText = Annotated[str, AfterValidator(_path)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Signal = Literal["exact", "sparse", "sampled"]
Support = Literal["student", "teacher", "union"]
LossMean = Literal["token", "sequence"]
Schedule = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "adam", "adafactor", "lion", "muon", "sgd"]
Backward = Literal["auto", "plain", "checkpoint", "layerwise"]


class _Settings(BaseModel):
    """Settings that refuse unknown names, and true or false for a number, which Python would take as 1 and 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are no value for this")
        return value


class LoraConfig(_Settings):
    """A fresh LoRA adapter, in mlx-lm's own terms. Ignored when `student_adapter_path` brings an adapter."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    scale: Positive = Field(2.0, description="Factor on the adapter's output (mlx-lm's scale, not alpha).")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    num_layers: int = Field(-1, ge=-1, le=100_000, description="Adapt this many last blocks; -1 adapts all.")
    keys: list[str] | None = Field(
        None, description="Names inside a block, such as self_attn.q_proj; None: every linear."
    )
    dora: bool = Field(False, description="Train a magnitude per output beside the low-rank product (DoRA).")


class RunConfig(_Settings):
    """Everything one run is made of. Paths are on the daemon's machine; `~` is expanded."""

    model_config = ConfigDict(validate_default=True)

    run_id: Identifier = Field("", description="Empty: distill_YYYYMMDD_HHMMSS.")
    session_id: Identifier = Field("", description="Session of a host application this run belongs to.")
    trainer: str = Field("on_policy", min_length=1, description="Name of a trainer; ListTrainers shows them.")
    trainer_options: dict[str, Any] = Field(default_factory=dict, description="Options of that trainer's own.")

    base_model_path: PathText = Field(min_length=1, description="Student base model: an mlx-lm folder.")
    teacher_model_path: PathText = Field(min_length=1, description="Teacher model: an mlx-lm folder.")
    student_adapter_path: PathText = Field("", description="Adapter to start from; empty starts a fresh LoRA.")
    output_adapter_path: PathText = Field(
        "",
        description="Where the final adapter is copied to, or the best with save_best_only or after an early stop; "
        "empty: only the checkpoints.",
    )

    prompts_path: PathText = Field("", description="JSONL file with training rows.")
    validation_prompts_path: PathText = Field(
        "", description="JSONL file with held-out rows; empty splits prompts_path."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share held out when one file serves both."
    )
    max_prompts: Count = Field(1000, description="Use at most this many training rows.")
    max_validation_prompts: Count = Field(50, description="Evaluate on at most this many held-out rows.")
    max_prompt_tokens: Count = Field(1024, description="Longer prompts are refused, with their line.")

    num_steps: Count = Field(1000, description="Optimizer updates.")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(2, description="Sequences in a micro-batch.")
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="Micro-batches in a step.")
    learning_rate: Positive = 1e-5
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 10
    lr_schedule: Schedule = "cosine"
    max_grad_norm: Positive = 1.0
    weight_decay: NonNegative = 0.0
    optimizer: OptimizerName = "adamw"
    optimizer_options: dict[str, Any] = Field(default_factory=dict, description="By mlx's names, such as betas.")
    max_batch_tokens: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        0, description="Most tokens of a micro-batch, padding included; 0: batch_size alone decides."
    )
    backward: Backward = Field("auto", description="Keep activations, or compute them again; auto: what fits.")

    divergence: str = Field("reverse_kl", min_length=1, description="Its name; ListDivergences shows them.")
    divergence_options: dict[str, Any] = Field(default_factory=dict, description="Options of the divergence's own.")
    signal: Signal = Field(
        "exact", description="Full distributions, some ids per position with a tail, or the sampled token alone."
    )
    support: Support = Field(
        "student", description="Signal sparse: whose likely ids carry the divergence; a tail carries the rest."
    )
    top_k: Annotated[int, Field(ge=1, le=1024)] = Field(64, description="Signal sparse: most ids per position.")
    top_mass: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Signal sparse: as many ids as reach this mass, up to top_k; 0: always top_k."
    )
    exact_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="Other signals: share of tokens on which the approximation's error is measured."
    )
    loss_mean: LossMean = Field("token", description="What counts the same: every token, or every sequence.")
    temperature: Positive = Field(2.0, le=100.0, description="Of both distributions in the loss; times T².")
    kl_weight: NonNegative = 0.8
    ce_weight: NonNegative = 0.2
    use_teacher_targets: bool = Field(True, description="Offline: train on the teacher's completions, not the data's.")

    max_generation_tokens: Annotated[int, Field(ge=1, le=131_072)] = 512
    generation_temperature: NonNegative = Field(1.0, description="Of sampling; 0 is greedy.")

    eval_every: Count = 100
    checkpoint_every: Count = 100
    keep_last_n: Count = Field(3, description="Checkpoints kept besides best and final.")
    save_best_only: bool = Field(
        False, description="Keep one checkpoint besides best and final; the best is the result."
    )
    early_stop_patience: Annotated[int, Field(ge=0, le=10_000)] = Field(
        0, description="End after so many evaluations without improvement; 0: never."
    )
    max_eval_samples: Annotated[int, Field(ge=0, le=10_000)] = Field(
        16, description="Held-out prompts evaluated on the student's own samples too."
    )
    eval_tasks: str = Field("", description="lm-evaluation-harness tasks at first and last evaluation, by commas.")

    use_cache: bool = Field(True, description="Look teacher results up in the daemon's cache and keep new ones.")
    precompute: bool = Field(
        False, description="Off-policy: the teacher computes everything first and is unloaded before the student loads."
    )
    teacher_template: Literal["student", "teacher"] = Field(
        "student", description="Whose chat template renders what the teacher reads."
    )
    teacher_system_prompt: str = Field("", description="A system prompt only the teacher sees.")
    worker_memory_limit_bytes: Annotated[int, Field(ge=0)] = Field(0, description="0: what the machine has.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    mixed_precision: bool = Field(True, description="Keep a 16-bit base in 16 bits; false loads it in float32.")
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        if self.kl_weight + self.ce_weight <= 0:
            message = "kl_weight and ce_weight are both 0: nothing would be learned; raise one of them"
            raise PydanticCustomError("cross_check", message, {"field": "kl_weight"})
        if not self.prompts_path and not self.validation_prompts_path:
            message = "names no file; give a JSONL file with a prompt a line, as README shows"
            raise PydanticCustomError("cross_check", message, {"field": "prompts_path"})
        return self

    def expanded(self) -> RunConfig:
        """The same configuration with `~` and relative paths made absolute (for the process that reads the file)."""
        names = [name for name in type(self).model_fields if name.endswith("_path")]
        paths = {name: str(user_path(value).absolute()) for name in names if (value := getattr(self, name))}
        return self.model_copy(update=paths)

    def to_yaml(self) -> str:
        """The complete configuration as YAML, loadable by `load_yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"num_steps": 100, "batch_size": 1, "max_prompts": 50},
    "quality": {"num_steps": 2000, "gradient_accumulation_steps": 8, "temperature": 3.0},
    "memory": {"batch_size": 1, "gradient_accumulation_steps": 8, "max_prompts": 500, "use_cache": True},
}
PRESET_SUMMARIES = {
    "fast": "fast iteration: 100 steps, batch 1, 50 prompts",
    "quality": "high quality: 2000 steps, accumulation 8, temperature 3",
    "memory": "memory efficient: batch 1, accumulation 8, 500 prompts, cache on",
}


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Validate plain data.

    Raises:
        OpdError: INVALID_RUN_CONFIG with one violation per fault, fields named `config.<name>`.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as fault:
        raise violations_error(config_violations(fault), Reason.INVALID_RUN_CONFIG) from None


def config_violations(fault: ValidationError, prefix: str = "config") -> list[FieldViolation]:
    """One violation per pydantic error, each with the offending value and what is allowed."""
    violations = []
    for entry in fault.errors(include_url=False):
        path = ".".join([prefix, *(str(part) for part in entry["loc"])])
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            message = f"no such field; {_nearest(str(entry['loc'][-1]))}"
        elif entry["type"] == "cross_check":
            path = f"{prefix}.{entry['ctx']['field']}"
        elif entry["type"] == "missing":
            message = "missing; every run needs it"
        elif entry["type"] != "value_error" or entry["loc"]:
            message = f"{_shown(entry.get('input'))}: {message[:1].lower()}{message[1:]}"
        violations.append(FieldViolation(path, message))
    return violations


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    known = [*RunConfig.model_fields, *LoraConfig.model_fields]
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "correct its name or remove it"


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


class _UniqueNames(yaml.SafeLoader):
    """Refuses a name given twice, of which YAML itself would silently take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        names = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in names:
                message = f"{key.value!r} is given twice; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            names.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file into plain data, not yet validated.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming file and line when it can't be read or isn't a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueNames)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: no such file", path=path) from None
    except OSError as fault:
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: can't be read: {fault.strerror}", path=path) from None
    except UnicodeDecodeError:
        message = f"{path}: not UTF-8; name a YAML file, saved as UTF-8"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message, path=path) from None
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(fault, "problem", None) or getattr(fault, "reason", None) or "not YAML"
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"{place}: {problem}", path=path) from None
    if not isinstance(values, dict):
        raise OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: holds no 'name: value' lines", path=path)
    for name in values:
        if not isinstance(name, str):
            raise OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: {name!r} is no name of a field", path=path)
    return values
