"""The model card of a finished adapter: how it was made, what that brought, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.home import RunFolders
    from opd_daemon.types import EvaluationMetrics, TeacherInfo

MARK = "<!-- Written by opd. -->"
SETTINGS = ("divergence", "signal", "temperature", "kl_weight", "ce_weight", "learning_rate", "optimizer", "seed")
SHOWN = {
    "forward_kl": ("forward KL", "nats per token"),
    "reverse_kl": ("reverse KL", "nats per token"),
    "js_divergence": ("Jensen–Shannon divergence", "nats per token"),
    "agreement": ("agreement on the likeliest token", "share of positions"),
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells of a run.

    base, teacher: folders; the digests are of their weights. settings: of the loss, by the configuration's names.
    tokens: completion tokens trained on. before, after: held-out numbers by the names of `EvaluationMetrics`, of the
    untrained student and of this one; empty where they weren't measured.
    """

    run_id: str
    base: str
    teacher: str
    teacher_digest: str
    trainer: str
    settings: Mapping[str, object]
    steps: int
    tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    version: str
    base_digest: str = ""

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        folders: RunFolders,
        teacher: TeacherInfo,
        *,
        step: int,
        base_digest: str = "",
        after: EvaluationMetrics | None = None,
    ) -> CardFacts:
        """The facts of a run up to a step, from what it has written down.

        after: the evaluation of that step, where that isn't written down yet.
        """
        from opd_daemon import __version__

        evaluations = [*_rows(folders.eval_metrics, step), *([asdict(after)] if after else ())]
        nothing: dict[str, Any] = {}
        before = next((row for row in evaluations if row["step"] == 0), nothing)
        last = next((row for row in reversed(evaluations) if row["step"] == step), nothing)
        return cls(
            run_id=folders.checkpoints.name,
            base=config.base_model_path,
            base_digest=base_digest,
            teacher=teacher.path,
            teacher_digest=teacher.digest,
            trainer=config.trainer,
            settings={name: getattr(config, name) for name in SETTINGS},
            steps=step,
            tokens=sum(int(row["tokens"]) for row in _rows(folders.train_metrics, step)),
            before={name: before[name] for name in SHOWN if name in before},
            after={name: last[name] for name in SHOWN if name in last},
            version=__version__,
        )


def card_text(facts: CardFacts, *, kind: str, rank: int, scale: float, peft: bool) -> str:
    """The card in Markdown. kind: LoRA or DoRA. peft: whether the folder also holds the adapter in PEFT's form."""
    base, teacher = Path(facts.base).name, Path(facts.teacher).name
    made = [
        ("base model", f"{base}{_digest(facts.base_digest)}"),
        ("teacher", f"{teacher}{_digest(facts.teacher_digest)}"),
        ("trainer", facts.trainer),
        *((name.replace("_", " "), str(value)) for name, value in facts.settings.items()),
        ("optimizer steps", str(facts.steps)),
        ("completion tokens trained on", f"{facts.tokens:,}"),
        ("adapter", f"{kind}, rank {rank}, scale {scale:g}"),
        ("made by", f"opd {facts.version}, run {facts.run_id}"),
    ]
    return "\n".join(
        [
            *("---", f"base_model: {_quoted(base)}", "library_name: peft" if peft else "library_name: mlx"),
            *("tags:", "- mlx", f"- {kind.lower()}", "- distillation", "---", MARK, ""),
            f"# {base}, taught by {teacher}",
            "",
            f"A {kind} adapter for {base}, distilled from {teacher}.",
            "",
            *_table(("", "how it was made"), made),
            "",
            *_results(facts),
            "## Loading it",
            "",
            *_loading(facts.base, peft=peft),
        ]
    )


def is_card(path: Path) -> bool:
    """Whether a file is such a card, and not somebody's own."""
    try:
        return MARK in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _results(facts: CardFacts) -> list[str]:
    known = [name for name in SHOWN if name in facts.before and name in facts.after]
    if not known:
        return []
    rows = [(*SHOWN[name], f"{facts.before[name]:.4f}", f"{facts.after[name]:.4f}") for name in known]
    says = "On held-out prompts never trained on, against the teacher at temperature 1:"
    return ["## Held-out results", "", says, "", *_table(("measure", "unit", "before", "after"), rows), ""]


def _loading(base: str, *, peft: bool) -> list[str]:
    mlx = [
        "```python",
        "import mlx_lm",
        "",
        f'model, tokenizer = mlx_lm.load("{base}", adapter_path="THIS_FOLDER")',
        "```",
    ]
    if not peft:
        return [*mlx, ""]
    torch = [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")',
        "```",
        "",
        "The base has to be the one it was trained on, quantised as it was there for exactly the same outputs.",
    ]
    return ["With mlx-lm:", "", *mlx, "", "With transformers and PEFT:", "", *torch, ""]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """A run's metrics up to a step; of a step that is there twice, the newest."""
    if not path.is_file():
        return []
    rows = {row["step"]: row for line in path.read_text(encoding="utf-8").splitlines() if (row := json.loads(line))}
    return [row for step, row in sorted(rows.items()) if step <= last_step]


def _digest(digest: str) -> str:
    return f" (sha256 {digest.removeprefix('sha256:')[:16]}…)" if digest else ""


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
