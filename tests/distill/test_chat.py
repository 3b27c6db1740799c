"""Chat templates read from a folder: rendered as transformers does, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from opd_daemon.distill.chat import PROBE, compare_templates, difference, read_template
from opd_daemon.errors import OpdError, Reason

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
SYSTEM = "<|im_start|>system\nYou are a careful tutor.<|im_end|>\n"


def folder(path: Path, template: object, **settings: object) -> Path:
    path.mkdir()
    content = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


def test_a_rendering_is_what_transformers_renders(smollm2: Path, tiny_student: Path) -> None:
    for path in (smollm2, tiny_student):
        template = read_template(path)
        assert template is not None
        chat = [{"role": "system", "content": "S"}, *PROBE, {"role": "assistant", "content": "<b>&"}, *PROBE]
        for messages in (list(PROBE), chat):
            expected = load_tokenizer(path).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert template.render(messages) == expected


def test_default_system_prompts_and_thinking_are_told_apart(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain", PLAIN + ASKS)
    assert compare_templates(plain, folder(tmp_path / "same", PLAIN + ASKS)) == ""
    thinking = compare_templates(plain, folder(tmp_path / "thinks", PLAIN + THINKS))
    assert thinking == r"student / teacher: '' / '<think>\n\n</think>\n\n'"
    tutor = compare_templates(plain, folder(tmp_path / "tutor", SYSTEM + PLAIN + ASKS))
    assert "You are a careful tutor." in tutor
    assert compare_templates(plain, folder(tmp_path / "none", None)) == "only the student has one"
    assert compare_templates(tmp_path / "nowhere", tmp_path / "none") == ""


def test_a_template_may_name_tokens_have_a_file_or_be_one_of_several(tmp_path: Path) -> None:
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}{{ eos_token }}"},
    ]
    path = folder(tmp_path / "several", several)
    template = read_template(path)
    assert template is not None
    assert template.render(PROBE) == "<s></s>"
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    template = read_template(path)
    assert template is not None
    assert template.render(PROBE) == PROBE[0]["content"]


def test_a_template_that_refuses_or_is_broken_is_named(tmp_path: Path) -> None:
    for number, source in enumerate(("{{ raise_exception('System role not supported') }}", "{% for %}")):
        template = read_template(folder(tmp_path / str(number), source))
        assert template is not None
        with pytest.raises(OpdError, match=r"the chat template of .* refuses it") as caught:
            template.render(PROBE)
        assert caught.value.reason == Reason.INVALID_RUN_CONFIG


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    template = read_template(folder(tmp_path / "evil", "{{ messages.__class__.__mro__ }}"))
    assert template is not None
    with pytest.raises(OpdError, match="unsafe"):
        template.render(PROBE)


def test_long_differences_are_cut_short() -> None:
    found = difference("a", "a" + " long" * 50)
    assert len(found) < 80
    assert found.endswith("…'")
