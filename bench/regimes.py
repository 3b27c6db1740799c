"""Which regime and which divergence on the small real pair, held out, over several seeds.

    python bench/regimes.py [--seeds 3] [--steps 12] [--together 2] [--output docs]

SmolLM2-135M teaches its 3-bit copy on the demo's prompts. Every run trains on the same number of sequences of at most
the same length, from the same start, with one setting of everything else; only trainer, divergence and seed differ.
The table that is printed shows mean ± standard deviation over the seeds; the picture shows every one. Runs that are
done already are kept in `regimes.json`, so the command can be stopped and started again. together: so many runs at a
time, each with a daemon and its share of the cores; on a CPU that takes less time in all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.demo.story import prompts_file
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind, RunState

CELLS = (
    ("sft", "forward_kl"),
    ("offline", "forward_kl"),
    ("offline", "reverse_kl"),
    ("offline", "jsd"),
    ("mixed", "reverse_kl"),
    ("on_policy", "forward_kl"),
    ("on_policy", "reverse_kl"),
    ("on_policy", "jsd"),
)
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "temperature": 1.0,
    "max_generation_tokens": 32,
    "lora": {"rank": 16, "scale": 2.0},
    "eval_every": 10_000,
    "checkpoint_every": 10_000,
    "max_eval_samples": 20,
}
SHOWN = (
    ("on_teacher", "forward_kl", "forward KL"),
    ("on_teacher", "reverse_kl", "reverse KL"),
    ("on_teacher", "agreement", "agreement"),
    ("on_student", "reverse_kl", "reverse KL, own samples"),
    ("on_student", "acceptance", "acceptance, own samples"),
)


def main() -> None:
    """Run what is missing, then print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "opd-daemon-bench")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    file = arguments.output / "regimes.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    teacher = convert_teacher(arguments.folder / "models" / "smollm2-135m-instruct", print)
    student = make_student(teacher, arguments.folder / "models" / "smollm2-135m-instruct-3bit", print)
    done = {(row["trainer"], row["divergence"], row["seed"]) for row in rows}
    wanted = [
        {**COMMON, **models_of(teacher, student), **method(*cell), "seed": seed, "num_steps": arguments.steps}
        for seed in range(1, arguments.seeds + 1)
        for cell in CELLS
        if (*cell, seed) not in done
    ]
    os.environ["OPENBLAS_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.together))
    with ThreadPoolExecutor(arguments.together) as pool:
        parts = [wanted[place :: arguments.together] for place in range(arguments.together)]
        homes = [Home(arguments.folder / f"home{place}") for place in range(len(parts))]
        found: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        at_work = [pool.submit(run_all, *given, found) for given in zip(homes, parts, strict=True)]
        working = len(parts)
        while working:
            row = found.get()
            working -= row is None
            if row is not None:
                rows.append(row)
                file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                print(line(row), flush=True)
        for part in at_work:
            part.result()  # raises what ended it
    print(markdown(rows))
    draw(rows, arguments.output / "regimes.png")


def models_of(teacher: Path, student: Path) -> dict[str, str]:
    """Models and prompts of every run."""
    return {
        "teacher_model_path": str(teacher),
        "base_model_path": str(student),
        "prompts_path": str(prompts_file("train.jsonl")),
        "validation_prompts_path": str(prompts_file("held_out.jsonl")),
    }


def method(trainer: str, divergence: str) -> dict[str, Any]:
    """What a cell of the table trains with."""
    weights = {"kl_weight": 0.0, "ce_weight": 1.0} if trainer == "sft" else {"kl_weight": 1.0, "ce_weight": 0.0}
    return {"trainer": trainer, "divergence": divergence, **weights}


def run_all(home: Home, wanted: list[dict[str, Any]], found: SimpleQueue[dict[str, Any] | None]) -> None:
    """Do some runs with a daemon of their own, telling each result, and None at the end."""
    try:
        with LocalDaemon(home) as daemon, daemon.client() as client:
            for values in wanted:
                found.put(run(client, values))
    finally:
        found.put(None)


def run(client: Client, values: dict[str, Any]) -> dict[str, Any]:
    """One run from start to end: its settings, evaluations, tokens and time."""
    run, revision = client.create_run(values)
    for item in client.watch(revision, run.run_id):
        if isinstance(item, Event) and item.kind is EventKind.RUN_STATE and RunState(item.payload["state"]).resting:
            break
    finished, _ = client.run(run.run_id)
    if finished.state is not RunState.SUCCEEDED:
        raise RuntimeError(f"{run.run_id} ended {finished.state}: {finished.error_message}")
    steps, evaluations, _ = client.metrics(run.run_id)
    return {
        "trainer": values["trainer"],
        "divergence": values["divergence"],
        "seed": values["seed"],
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "before": _measures(evaluations[0]),
        "after": _measures(evaluations[-1]),
    }


def _measures(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: evaluation[name][key] for _, key, _ in SHOWN} for name in ("on_teacher", "on_student")}


def line(row: dict[str, Any]) -> str:
    """One finished run, for who waits."""
    numbers = "  ".join(f"{words} {row['after'][on][key]:.3f}" for on, key, words in SHOWN)
    return f"{row['trainer']:10} {row['divergence']:11} seed {row['seed']}  {numbers}  {row['tokens']} tokens"


def groups(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Runs by cell, in the order of the table."""
    found = []
    for trainer, divergence in CELLS:
        cell = [row for row in rows if (row["trainer"], row["divergence"]) == (trainer, divergence)]
        if cell:
            found.append((trainer if trainer == "sft" else f"{trainer}, {divergence}", cell))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The comparison as a table."""
    head = ["", *(words for _, _, words in SHOWN), "tokens trained on"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    start = [f"{statistics.fmean(row['before'][on][key] for row in rows):.3f}" for on, key, _ in SHOWN]
    lines.append(f"| before | {' | '.join(start)} | |")
    for name, cell in groups(rows):
        numbers = [_spread([row["after"][on][key] for row in cell]) for on, key, _ in SHOWN]
        tokens = statistics.fmean(row["tokens"] for row in cell)
        lines.append(f"| {name} | {' | '.join(numbers)} | {tokens:.0f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Every seed as a dot, the mean as a bar, for three of the measures."""
    from matplotlib.figure import Figure

    shown = (SHOWN[0], SHOWN[1], SHOWN[3])
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    cells = groups(rows)
    places = list(range(len(cells)))[::-1]
    for axes, (on, key, words) in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for place, (_, cell) in zip(places, cells, strict=True):
            values = [row["after"][on][key] for row in cell]
            axes.plot([statistics.fmean(values)] * 2, [place - 0.32, place + 0.32], color="#2563eb", linewidth=3)
            axes.plot(values, [place] * len(values), "o", color="#d97706", markersize=5)
        axes.set_yticks(places, [name for name, _ in cells])
        axes.set_title(f"{words}, nats per token", fontsize=10)
        axes.grid(axis="x", color="#e5e7eb")
        axes.spines[["top", "right", "left"]].set_visible(False)
    count = len({row["seed"] for row in rows})
    seeds = f"{count} seeds (dots) and their mean (bar)" if count > 1 else "one seed"
    figure.suptitle(f"Held out, after training: {seeds}; lower is better", fontsize=11)
    figure.savefig(file)


if __name__ == "__main__":
    main()
