"""Reports from the files of runs: complete, sparse, broken, long, and written by someone who means harm."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opd_daemon.distill.report import write_report
from opd_daemon.distill.report.curves import MOST_POINTS, curve
from opd_daemon.distill.report.drawing import COLORS, Chart, line, to_png, to_standalone_svg, to_svg
from opd_daemon.distill.report.heatmap import heatmap
from opd_daemon.distill.report.measures import Estimate, criterion_of, differ
from opd_daemon.distill.report.page import render, sections
from opd_daemon.distill.report.record import RunRecord
from opd_daemon.distill.report.summary import cards, headline_side, planned_sizes, planned_times, sentence
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home, RunFolders
from opd_daemon.types import Run, RunState
from tests.distill.written_run import evaluation, run_of, step_metrics, write_rows, write_run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg/onload=alert(3)>&amp;{{7*7}}{% raw %}]]><!--"
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def text_of(run: Run, folders: RunFolders) -> str:
    """The page alone: pictures take as long again."""
    record = RunRecord.read(run, folders)
    return render(record, sections(record))


def page_of(home: Home, run: Run, **changes: Any) -> str:
    return text_of(run, write_run(home, run, **changes))


def test_a_complete_run_has_every_part_and_a_picture_of_every_chart(home: Home) -> None:
    run = run_of(12)
    text = write_report(run, write_run(home, run)).read_text(encoding="utf-8")
    page = Page(text)
    for words in (
        "On the teacher's answers to 8 held-out prompts, the student's reverse KL to its teacher fell",
        "Reverse KL by position",
        "Reverse KL by quarter",
        "Token by token",
        "student before",
        "Because of the air.",
        "Plan and reality",
        "every completion of full length",
        "rollout",
        "base_model_path",
        "mlx-lm",
    ):
        assert words in page.text
    pictures = sorted(home.run(run.run_id).pictures.iterdir())
    assert len(pictures) == text.count("<figure>")
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)


def test_the_page_needs_nothing_from_outside_and_runs_no_script(home: Home) -> None:
    text = page_of(home, run_of(4))
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"})
    assert not {name for name in page.attributes if name.startswith("on")} | (page.attributes & {"src", "href"})
    outside = set(re.findall(r"https?://[^\s\"'<]*", text))
    assert outside == {"http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in re.findall(r' id="([^"]*)"', text)}
    assert "default-src 'none'" in text


def test_hostile_text_is_shown_and_never_obeyed(home: Home) -> None:
    run = run_of(3, trainer=EVIL, divergence="reverse_kl", teacher_system_prompt=EVIL)
    text = page_of(home, run, prompt=EVIL, answer=EVIL, tokens=(EVIL, "\n", "", "\u202e", " ok"))
    page = Page(text)
    assert page.tags.isdisjoint({"script", "img"})
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.text.count(EVIL) >= 5


def test_every_reference_inside_the_page_is_unique_and_there(home: Home) -> None:
    text = page_of(home, run_of(3))
    names = re.findall(r' id="([^"]*)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'xlink:href="#([^"]*)"', text)) <= set(names)


def test_no_number_of_a_step_may_be_one(home: Home) -> None:
    steps = [step_metrics(step, 6, reverse_kl=float("nan"), grad_norm=float("inf")) for step in range(1, 7)]
    steps[3] = step_metrics(4, 6)
    run = run_of(6)
    folders = write_run(home, run, steps=steps, evaluations=[evaluation(0, 2.0), evaluation(6, float("nan"))])
    with folders.train_metrics.open("a") as file:
        file.write('[1, 2]\n"words"\n{"no": "step"}\n{"step": 7, "rev')
    text = text_of(run, folders)
    assert "nan" not in Page(text).text.lower().replace("finance", "")
    assert "inf " not in Page(text).text


@pytest.mark.parametrize("missing", ["eval_metrics", "train_metrics", "samples", "token_tables"])
def test_what_a_run_does_not_have_is_left_out(home: Home, missing: str) -> None:
    run = run_of(5)
    folders = write_run(home, run)
    getattr(folders, missing).unlink()
    page = Page(text_of(run, folders))
    absent = {
        "eval_metrics": ["On the teacher's completions"],
        "train_metrics": ["Gradient norm", "Time and memory"],
        "samples": ["student before"],
        "token_tables": ["Token by token", "by position"],
    }[missing]
    assert not [words for words in absent if words in page.text]
    assert "How it was made" in page.text


def test_rows_of_older_versions_are_read_without_intervals(home: Home) -> None:
    old = [
        {name: value for name, value in evaluation(step, kl).items() if not name.startswith("on_")}
        for step, kl in ((0, 2.0), (4, 1.0))
    ]
    page = Page(page_of(home, run_of(4), evaluations=old))
    assert "fell from 2.000 to 1.000" in page.text
    assert "Expected share of the student's drafts" not in page.text


def test_a_damaged_token_table_is_left_out(home: Home) -> None:
    run = run_of(4)
    folders = write_run(home, run)
    folders.token_tables.write_text('[{"step": 0}]')
    assert "Token by token" not in text_of(run, folders)


def test_a_run_that_measured_nothing_has_no_report(home: Home) -> None:
    with pytest.raises(OpdError) as found:
        write_report(run_of(4), home.run("fixture"))
    assert found.value.reason is Reason.REPORT_NOT_FOUND


def test_a_stopped_run_says_how_far_it_came(home: Home) -> None:
    run = run_of(100, state=RunState.STOPPED)
    steps = [step_metrics(step, 100) for step in range(1, 8)]
    page = Page(page_of(home, run, steps=steps, evaluations=[evaluation(0, 2.0)]))
    assert "STOPPED" in page.text
    assert "7 of 100 steps were done" in page.text


def test_a_long_run_is_thinned_and_keeps_its_mean(home: Home) -> None:
    rows = [step_metrics(step, 5000, loss=float(step % 7)) for step in range(1, 5001)]
    thinned = curve(rows, "loss")
    assert len(thinned.x) == MOST_POINTS
    assert sum(thinned.y) / len(thinned.y) == pytest.approx(3.0, abs=0.05)
    assert all(low <= middle <= high for low, middle, high in zip(thinned.low, thinned.y, thinned.high, strict=True))
    short, long = page_of(home, run_of(5)), page_of(home, run_of(5000, run_id="long"), steps=rows)
    assert len(long) < 3 * len(short)


def test_a_resumed_step_counts_once(home: Home) -> None:
    run = run_of(3)
    rows = [step_metrics(1, 3), step_metrics(2, 3, tokens=1), step_metrics(2, 3), step_metrics(3, 3)]
    record = RunRecord.read(run, write_run(home, run, steps=rows))
    assert [(row["step"], row["tokens"]) for row in record.steps] == [(1, 100), (2, 100), (3, 100)]


def test_a_change_within_its_intervals_is_called_noise(home: Home) -> None:
    run = run_of(4)
    record = RunRecord.read(run, write_run(home, run, evaluations=[evaluation(0, 1.05), evaluation(4, 1.0)]))
    assert cards(record)[0].verdict == "noise"
    assert "within noise" in sentence(record)
    assert differ(Estimate(1.0, 0.1), Estimate(1.3, 0.1)) is True
    assert differ(Estimate(1.0, 0.1), Estimate(1.1, 0.1)) is False
    assert differ(Estimate(1.0), Estimate(1.3, 0.1)) is None


def test_the_headline_is_of_the_side_the_best_was_chosen_by(home: Home) -> None:
    run = run_of(4, divergence="forward_kl")
    rows = [evaluation(0, 2.0), evaluation(4, 1.0)]
    for row in rows:
        row["validation_kl"] = row["on_student"]["forward_kl"]
    record = RunRecord.read(run, write_run(home, run, evaluations=rows))
    assert headline_side(record) == "student"
    assert sentence(record).startswith("On its own samples for 8 held-out prompts, the student's forward KL")
    shared = rows[1]["on_student"]["acceptance"]  # the rest is the total variation
    assert criterion_of({**rows[1], "validation_kl": 1.0 - shared}) == ("student", "acceptance")
    assert criterion_of({**rows[1], "validation_kl": -1.0}) is None


def test_the_plan_stands_beside_what_was_measured(home: Home) -> None:
    run = run_of(10)
    assert run.finished_at is not None
    run = replace(run, started_at=run.finished_at - timedelta(seconds=50))
    rows = {row.name: row for row in planned_times(RunRecord.read(run, write_run(home, run)))}
    assert (rows["rollout"].planned, rows["rollout"].measured, rows["rollout"].ratio) == (20.0, 10.0, "× 0.50")
    assert rows["evaluate"].measured == 6.0
    assert (rows["the rest"].planned, rows["the rest"].measured) == (2.0, 50.0 - 10.0 - 5.0 - 4.0 - 6.0)
    assert (rows["all"].planned, rows["all"].measured) == (40.0, 50.0)


def test_planned_sizes_are_of_what_was_measured(home: Home) -> None:
    run = run_of(4)
    folders = write_run(home, run)
    folders.checkpoints.mkdir(parents=True)
    (folders.checkpoints / "weights").write_bytes(bytes(3_000_000))
    rows = {row.name: row for row in planned_sizes(RunRecord.read(run, folders))}
    assert (rows["memory, worker's arrays"].planned, rows["memory, worker's arrays"].measured) == (1.6e9, 1.5e9)
    assert (rows["memory, daemon"].planned, rows["memory, daemon"].measured) == (9e8, None)
    assert (rows["disk, checkpoints"].planned, rows["disk, checkpoints"].measured) == (4_000_000, 3_000_000)


def test_task_scores_are_compared(home: Home) -> None:
    rows = [evaluation(0, 2.0, tasks={"arc_easy": 0.41}), evaluation(4, 1.0, tasks={"arc_easy": 0.47, "new": 0.1})]
    page = Page(page_of(home, run_of(4), evaluations=rows))
    assert re.search(r"Tasks\s*before\s*after\s*change\s*arc_easy %\s*41.0\s*47.0\s*\+6.0 points", page.text)


def test_the_heat_map_has_one_scale_for_before_and_after(home: Home) -> None:
    run = run_of(4)
    found = heatmap(RunRecord.read(run, write_run(home, run)))
    assert found is not None
    (prompt, sides), *_ = found.completions
    assert prompt == "Why is the sky blue?"
    assert [side.title for side in sides] == ["before", "after"]
    before, after = (float(side.tokens[0].shade) for side in sides)
    assert before == pytest.approx(4 * after, abs=0.03)
    assert all(token.differs for token in sides[0].tokens)


def test_a_second_report_replaces_the_first_and_its_pictures(home: Home) -> None:
    run = run_of(3)
    folders = write_run(home, run)
    write_report(run, folders)
    stale = folders.pictures / "stale.png"
    stale.write_bytes(b"")
    folders.samples.unlink()
    write_rows(folders.train_metrics, [step_metrics(1, 3)])
    write_report(run, folders)
    assert not stale.exists()
    assert "student before" not in folders.report.read_text()


def test_a_chart_is_drawn_once_for_page_file_and_picture() -> None:
    chart = Chart("x", 'A "title" & <more>', lambda axes: line(axes, [0, 1], [0.00012, 1], COLORS["student"]))
    svg = to_svg(chart)
    assert "var(--student)" in svg
    assert not [value for value in COLORS.values() if value in svg]
    assert 'aria-label="A &quot;title&quot; &amp; &lt;more&gt;"' in svg
    assert len(svg) < 6000
    assert to_standalone_svg(chart).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert to_png(chart).startswith(b"\x89PNG")
    assert to_svg(chart) == svg
