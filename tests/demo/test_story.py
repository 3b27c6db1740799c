"""The demo's story on tiny models: the same path as the real one, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from opd_daemon.client import Client
from opd_daemon.demo import story
from opd_daemon.demo.answers import student_answers
from opd_daemon.demo.curve import draw_curve
from opd_daemon.demo.result import METRICS, DemoResult, Seconds
from opd_daemon.demo.table import show_result
from opd_daemon.distill.report.answers import Answers
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Event, EventKind, Run
from tests.demo.stage import QuietStage

TINY = {"max_generation_tokens": 4, "max_prompts": 8, "max_validation_prompts": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> story.DemoSettings:
    return story.DemoSettings(tmp_path_factory.mktemp("demo"), steps=4, overrides=TINY)


@pytest.fixture(scope="module")
def told(settings: story.DemoSettings, tiny_teacher: Path, tiny_student: Path) -> tuple[DemoResult, DemoResult]:
    """The story told twice, each time with a daemon of its own."""
    results = []
    for _ in range(2):
        seconds, stage = Seconds(), QuietStage()
        with story.demo_daemon(settings, seconds, stage) as client:
            results.append(story.tell(settings, client, (tiny_teacher, tiny_student), seconds, stage))
        assert stage.followed
    return results[0], results[1]


def test_before_is_the_untrained_student_and_after_the_last_step(told: tuple[DemoResult, DemoResult]) -> None:
    result = told[0]
    assert (result.before["step"], result.after["step"]) == (0, 4)
    assert result.before["samples"] == 3
    assert [step["step"] for step in result.steps] == [1, 2, 3, 4]
    assert Path(result.adapter_path, "adapters.safetensors").is_file()


def test_the_same_held_out_prompts_are_answered_by_all(told: tuple[DemoResult, DemoResult]) -> None:
    held_out = story.prompts_file("held_out.jsonl").read_text()
    assert len(told[0].answers) == 3
    for answers in told[0].answers:
        assert answers.prompt in held_out
        assert answers.teacher


def test_every_phase_has_its_seconds(told: tuple[DemoResult, DemoResult]) -> None:
    phases = told[0].seconds.phases
    assert {"start", "load", "baseline evaluation", "evaluation", "rollout", "score", "train"} <= phases.keys()
    assert all(value >= 0 for value in phases.values())


def test_the_second_demo_finds_the_cache_warm(told: tuple[DemoResult, DemoResult]) -> None:
    cold, warm = told[0].cache, told[1].cache
    assert cold.misses > 0
    assert warm.hits > cold.hits
    assert warm.misses < cold.misses
    assert warm.milliseconds_saved > 0


def test_the_json_file_has_what_programs_look_for(told: tuple[DemoResult, DemoResult], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "demo.json"
    told[0].write_json(file)
    written = json.loads(file.read_text())
    assert written["before"].keys() == written["after"].keys() == set(METRICS)
    assert 0 <= written["after"]["agreement"] <= 1
    assert written["adapter_path"] == told[0].adapter_path
    assert written["command"].startswith("mlx_lm.generate --model ")
    assert written["cache"]["misses"] == told[0].cache.misses
    assert written["seconds"]["train"] > 0


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_shows_before_after_and_change(told: tuple[DemoResult, DemoResult], width: int) -> None:
    before, after = {**told[0].before, "agreement": 0.30}, {**told[0].after, "agreement": 0.55}
    answers = [Answers("Why is the sky blue?", "air [blue]", "because air scatters blue", "Rayleigh scattering")]
    result = replace(told[0], before=before, after=after, answers=answers, curve_path="/c.png")
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        show_result(result, console)
    text = console.export_text()
    for words in (
        "forward KL",
        "reverse KL",
        "30.0 %",
        "55.0 %",
        "↑ 25.0 points",
        "air [blue]",
        "Rayleigh",
        "baseline",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines() if line.startswith(("│", "╭"))) <= width
    model = result.run.config["base_model_path"]
    assert f"mlx_lm.generate --model {model} --adapter-path {result.adapter_path}" in text
    assert f"report: {result.run.report_path}" in text.replace("\n", "")
    assert Path(result.run.report_path).is_file()


def test_the_learning_curve_is_a_png(told: tuple[DemoResult, DemoResult], tmp_path: Path) -> None:
    file = draw_curve(told[0], tmp_path / "curve.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_trainer_is_refused_before_anything_is_prepared(settings: story.DemoSettings) -> None:
    with pytest.raises(OpdError, match="--trainer magic: the demo knows offline and on_policy"):
        replace(settings, trainer="magic").run_values(Path("t"), Path("s"))


def test_a_run_that_fails_is_an_error_with_its_cause(
    settings: story.DemoSettings, tiny_teacher: Path, tmp_path: Path, tiny_student: Path
) -> None:
    class StoppingStage(QuietStage):
        def follow(self, client: Client, run: Run) -> None:
            client.stop(run.run_id)
            super().follow(client, run)

    seconds, stage = Seconds(), StoppingStage()
    with story.demo_daemon(replace(settings, folder=tmp_path), seconds, stage) as client:
        with pytest.raises(OpdError, match="ended STOPPED") as found:
            story.tell(replace(settings, steps=5000), client, (tiny_teacher, tiny_student), seconds, stage)
        assert found.value.reason is Reason.INTERNAL


def sample(step: int, prompt: str, completion: str, source: str = "student") -> Event:
    payload = {"step": step, "prompt": prompt, "completion": completion, "source": source}
    return Event(EventKind.SAMPLE, "run", payload, datetime.now(UTC), 1)


def test_answers_are_those_given_both_before_and_after() -> None:
    events = [
        sample(0, "held out", "bad"),
        sample(1, "training", "whatever"),
        sample(4, "held out", "better"),
        sample(8, "held out", "good"),
        sample(0, "only before", "x"),
        sample(8, "held out", "from the teacher", source="teacher"),
    ]
    assert student_answers(events) == [Answers("held out", "bad", "good")]


def test_kill_9_of_the_demo_leaves_no_process(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from opd_daemon.demo import story
from opd_daemon.demo.result import Seconds
from tests.demo.stage import QuietStage
class Telling(QuietStage):
    def follow(self, client, run):
        for item in client.watch(0, run.run_id):
            if getattr(item, "payload", {{}}).get("step") == 1:
                print("training", flush=True)
settings = story.DemoSettings(Path({str(tmp_path)!r}), steps=5000, overrides={TINY!r})
seconds, stage = Seconds(), Telling()
with story.demo_daemon(settings, seconds, stage) as client:
    story.tell(settings, client, (Path({str(tiny_teacher)!r}), Path({str(tiny_student)!r})), seconds, stage)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "training\n"
        children = psutil.Process(program.pid).children(recursive=True)
        assert len(children) >= 2
        program.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
