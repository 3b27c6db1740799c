"""One adapter folder, read by mlx-lm and by PEFT on torch: the largest difference of their logits, in float32.

    make bench-env && python bench/peft_logits.py [--model FOLDER]

For LoRA and DoRA on every linear layer, and on some layers of the last blocks. The adapters are moved as far from where
they start as training moves them, and written as a finished run writes them. The first line is the base alone: what
float32 in two libraries differs by.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import mlx_lm
import numpy as np

from opd_daemon.config import LoraConfig
from opd_daemon.demo.smollm2 import convert_teacher
from opd_daemon.distill.model_card import CardFacts
from opd_daemon.distill.student import Student

TOLERANCE = 1e-5
TORCH = Path(__file__).parent.parent / ".venv-bench" / "bin" / "python"
TEXT = (
    "The tide comes in twice a day, and twice a day it leaves the harbour to the gulls. A baker who rises at four "
    "knows the street before it has a voice, and sells it bread while it is still looking for its shoes."
)
SAID = {""}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA, every linear layer": {"rank": 16},
    "DoRA, every linear layer": {"rank": 8, "dora": True},
    "LoRA, last 8 blocks, attention": {"rank": 8, "num_layers": 8, "keys": ["self_attn.q_proj", "self_attn.v_proj"]},
    "DoRA, last 8 blocks, with dropout": {"rank": 4, "num_layers": 8, "dora": True, "dropout": 0.1},
}


def main() -> None:
    """Compare, and fail where the difference is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an mlx-lm folder; default: SmolLM2-135M, as the demo converts it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.model or convert_teacher(Path(folder) / "base", print)
        tokens = _tokens(base)
        bare = _difference(_by_mlx_lm(base, None, tokens), _by_peft(base, None, Path(folder), tokens))
        print(f"{'no adapter':36} {bare}")
        worst = 0.0
        for number, (name, settings) in enumerate(ADAPTERS.items()):
            adapter = Path(folder) / f"adapter_{number}"
            effect = _write(base, adapter, LoraConfig(**settings), tokens)
            found = _difference(_by_mlx_lm(base, adapter, tokens), _by_peft(base, adapter, adapter, tokens))
            print(f"{name:36} {found}; the adapter moves logits by up to {effect:.1f}", flush=True)
            worst = max(worst, found.relative)
    if worst > TOLERANCE:
        raise SystemExit(f"{worst:.1e} of the largest logit is above {TOLERANCE:.0e}")


@dataclass(frozen=True)
class Difference:
    """The largest difference of two arrays of logits, of PEFT's from its own in float64, and the largest logit."""

    logits: float
    rounding: float
    largest: float

    @property
    def relative(self) -> float:
        """As a share of the largest logit."""
        return self.logits / self.largest

    def __str__(self) -> str:
        own = f"PEFT's from its own in float64 {self.rounding:.1e}"
        return f"largest difference {self.logits:.1e} ({own}), {self.relative:.1e} of the largest logit"


def _difference(ours: Any, theirs: tuple[Any, Any]) -> Difference:
    single, double = theirs
    return Difference(*(float(np.abs(values).max()) for values in (ours - single, double - single, ours)))


def _tokens(base: Path) -> Any:
    """A text, not random tokens: those give logits so large that float32 itself is further off."""
    _, tokenizer = mlx_lm.load(str(base), lazy=True)
    return np.array([tokenizer.encode(f"{TEXT} {TEXT}")[:48]], dtype=np.int32)


def _write(base: Path, adapter: Path, lora: LoraConfig, tokens: Any) -> float:
    student = Student.load(base, None, lora, seed=0, float32=True)
    before = np.array(student.model(mx.array(tokens)))
    noise = np.random.default_rng(1)
    for name, tensor in student.parameters().items():
        moved = mx.array(noise.normal(size=tensor.shape).astype(np.float32))
        student.update({name: tensor + 0.005 * (moved * tensor if name.endswith(".m") else moved)})
    facts = CardFacts("bench", str(base), str(base), "", "on_policy", {}, 1, 1, {}, {}, "0")
    student.save_adapter(adapter, facts)
    return float(np.abs(np.array(student.model(mx.array(tokens))) - before).max())


def _by_mlx_lm(base: Path, adapter: Path | None, tokens: Any) -> Any:
    model, _ = mlx_lm.load(str(base), adapter_path=str(adapter) if adapter else None)
    return np.array(model(mx.array(tokens)))


def _by_peft(base: Path, adapter: Path | None, folder: Path, tokens: Any) -> tuple[Any, Any]:
    np.save(folder / "tokens.npy", tokens)
    script = str(Path(__file__).with_name("peft_torch.py"))
    files = [str(folder / name) for name in ("tokens.npy", "logits.npy")]
    done = subprocess.run([TORCH, script, base, adapter or "", *files], check=True, capture_output=True, text=True)
    if (says := done.stdout.strip()) not in SAID:
        print(says)
        SAID.add(says)
    single, double = np.load(files[1])
    return single, double


if __name__ == "__main__":
    main()
