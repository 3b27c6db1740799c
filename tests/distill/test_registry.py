"""What divergences take, and why some requests for one are refused."""

from __future__ import annotations

from typing import Any

import pytest

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill import divergences, registry
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import BUILT_IN_DIVERGENCES, DivergenceInfo

PATHS = {"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p"}


def configured(**changes: Any) -> RunConfig:
    return parse_config({**PATHS, **changes})


@pytest.mark.parametrize(
    ("name", "signal", "options", "words"),
    [
        ("reverse_kl", "sampled", {"estimator": "k1"}, ["k1", "expectation is 0"]),
        ("reverse_kl", "sampled", {"estimator": "k3"}, ["k3", "forward KL"]),
        ("reverse_kl", "sampled", {"advantage": "top_k"}, ["top_k", "expected gradient 0", "sparse"]),
        ("jsd", "sparse", {"tail": False}, ["tail", "no divergence"]),
        ("forward_kl", "sparse", {"tail": False}, ["falls below 0"]),
        ("reverse_kl", "sparse", {"tail": "truncated"}, ["keep the tail"]),
        ("jsd", "sparse", {"tail": "renormalised"}, ["tail is no option of jsd"]),
        ("jsd", "sampled", {}, ["sampled", "reverse KL"]),
        ("forward_kl", "sampled", {}, ["under the student alone"]),
        ("reverse_kl", "exact", {"baseline": "value"}, ["baseline", "signal sampled, not exact"]),
        ("forward_kl", "exact", {"tail": "renormalised"}, ["tail", "signal sparse"]),
        ("jsd", None, {"beta": 1.5}, ["beta", "1.5", "less than or equal to 1"]),
        ("jsd", None, {"bta": 0.5}, ["bta is no option of jsd", "token_clip, beta"]),
        ("skew_forward_kl", None, {"alpha": 1.0}, ["alpha", "less than 1"]),
        ("total_variation", None, {"token_clip": -1}, ["token_clip", "greater than 0"]),
        ("js", None, {}, ["'js'", "did you mean jsd?", "total_variation"]),
    ],
)
def test_what_can_not_work_is_refused_with_the_reason(
    name: str, signal: str | None, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(OpdError) as caught:
        divergences.get(name, signal=signal, **options)
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_above_0(temperature: float) -> None:
    with pytest.raises(OpdError, match="temperature"):
        divergences.get("jsd", temperature=temperature)


def test_a_kept_tail_may_be_said() -> None:
    assert divergences.get("jsd", tail=True).name == "jsd"


def test_plugins_know_the_names_that_are_taken() -> None:
    assert tuple(registry.BUILT_IN) == BUILT_IN_DIVERGENCES


@pytest.mark.parametrize("name", BUILT_IN_DIVERGENCES)
def test_every_divergence_is_made_for_each_of_its_signals(name: str) -> None:
    info = registry.BUILT_IN[name]
    assert {"exact", "sparse"} <= set(info.signals)
    assert ("sampled" in info.signals) == (name == "reverse_kl")
    for signal in info.signals:
        made = registry.create(info, {}, temperature=2.0, signal=signal)
        assert (made.name, made.temperature) == (name, 2.0)
    assert info.options.model_json_schema()["properties"]


@pytest.mark.parametrize(
    ("changes", "on_policy", "field", "words"),
    [
        ({"divergence": "kl"}, True, "config.divergence", "no divergence 'kl'"),
        ({"divergence": "jsd", "divergence_options": {"beta": 2}}, True, "config.divergence_options.beta", "2: "),
        ({"divergence": "jsd", "signal": "sampled"}, True, "config.signal", "reverse KL"),
        ({"signal": "sampled"}, True, "config.generation_temperature", "set 2, or use signal exact"),
        ({"signal": "sampled", "temperature": 1.0}, False, "config.signal", "didn't sample"),
        (
            {"signal": "sampled", "generation_temperature": 2.0, "divergence_options": {"importance_clip": 3}},
            True,
            "config.generation_temperature",
            "set 1",
        ),
        ({"top_mass": 0.9}, True, "config.top_mass", "this is exact"),
        (
            {"signal": "sparse", "top_k": 1, "divergence_options": {"tail": "renormalised"}},
            True,
            "config.top_k",
            "nothing would be learned",
        ),
    ],
)
def test_a_runs_divergence_is_checked_before_it_starts(
    changes: dict[str, Any], on_policy: bool, field: str, words: str
) -> None:
    [fault] = registry.check_config(configured(**changes), on_policy=on_policy)
    assert fault.field == field
    assert words in fault.description


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"signal": "sampled", "temperature": 1.0},
        {"signal": "sampled", "temperature": 2.0, "generation_temperature": 2.0},
        {"signal": "sampled", "temperature": 2.0, "divergence_options": {"importance_clip": 3}},
        {"divergence": "jsd", "divergence_options": {"beta": 0.1, "token_clip": 0.05}, "signal": "sparse"},
        {"signal": "sparse", "top_k": 1, "top_mass": 0.9},
    ],
)
def test_sound_runs_pass(changes: dict[str, Any]) -> None:
    assert registry.check_config(configured(**changes)) == []


def test_a_plugins_divergence_is_found_and_gets_options_and_temperature() -> None:
    made: list[Any] = []

    def factory(options: Any, temperature: float) -> Any:
        made.append((options, temperature))
        return divergences.get("jsd")

    info = DivergenceInfo("mine", "Mine.", factory, registry.JsdOptions, ("exact",))
    offered = {"mine": info}
    config = configured(divergence="mine", divergence_options={"beta": 0.3})
    assert registry.check_config(config, offered) == []
    [fault] = registry.check_config(config.model_copy(update={"signal": "sparse"}), offered)
    assert "exact" in fault.description
    registry.create(registry.find("mine", offered), {"beta": 0.3}, temperature=3.0, signal="exact")
    assert made == [(registry.JsdOptions(beta=0.3), 3.0)]
