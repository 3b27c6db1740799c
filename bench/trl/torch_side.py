"""TRL's stable DistillationTrainer on torch CPU; started by `bench/whole_run.py` in the bench environment.

    python bench/trl/torch_side.py SETTINGS.json

Prints one JSON line: seconds of every step, of the whole training, tokens generated, and the process's peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._started)


def main() -> None:
    """Train and print."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["student"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(settings["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(settings["teacher"], dtype=torch.float32)
    config = DistillationConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        max_completion_length=settings["completion"],
        temperature=1.0,
        beta=1.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
    )
    rank = settings["rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in settings["prompts"]]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = sum(lengths) * settings["batch"]
    print(json.dumps({"steps": clock.seconds, "seconds": seconds, "tokens": tokens, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
