"""Model files that lie: refused from their headers, with the reason, and the daemon stays up."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models import folder as models
from opd_daemon.models.folder import FolderFault, read_folder, read_header
from tests.tiny import write_tiny_qwen2

WEIGHTS = "model.safetensors"
Header = dict[str, Any]


def rewrite(model: Path, change: Callable[[Header], object]) -> None:
    """Change the header of the weights and leave the data as it is."""
    file = model / WEIGHTS
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def tensor(header: Header) -> Header:
    found: Header = header["model.norm.weight"]
    return found


def lie(**changes: Any) -> Callable[[Path], None]:
    return lambda model: rewrite(model, lambda header: tensor(header).update(changes))


def retype(name: str, dtype: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        weights = load_file(model / WEIGHTS)
        weights[name] = weights[name].astype(dtype)
        save_file(weights, model / WEIGHTS, metadata={"format": "mlx"})

    return change


def configure(**values: Any) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))

    return change


def crowd(model: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    rewrite(model, lambda header: header.update({f"x{number}": empty for number in range(100_000)}))


def cut(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 100)


def shift(header: Header) -> None:
    first, last = tensor(header)["data_offsets"]
    tensor(header)["data_offsets"] = [first - 4, last - 4]


def pipe(model: Path) -> None:
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)


LAYER = "model.layers.0.self_attn.q_proj"
# The damage, and what is said of it.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda model: (model / WEIGHTS).unlink(), "holds no model*.safetensors"),
    "truncated": (cut, "cut off"),
    "empty": (lambda model: (model / WEIGHTS).write_bytes(b""), "not a safetensors file, or cut off"),
    "no safetensors": (lambda model: (model / WEIGHTS).write_bytes(b"PK\x03\x04" * 100), "not a safetensors file"),
    "a pickle": (lambda model: (model / WEIGHTS).write_bytes(b"\x80\x04\x95" + bytes(100)), "not a safetensors file"),
    "shape too large": (lie(shape=[65]), "can't be F32 of shape (65,) in 256 bytes"),
    "shape too small": (lie(shape=[63]), "can't be F32 of shape (63,) in 256 bytes"),
    "overflowing shape": (lie(shape=[2**62, 2**62, 16]), "its header is broken"),
    # 2^62 · 4 bytes are 0 in 64 bits.
    "shape that overflows to nothing": (lie(shape=[2**62], data_offsets=[0, 0]), "its header is broken"),
    "4194305 cubed": (lie(shape=[4_194_305] * 3), "its header is broken"),
    "a million sides": (lie(shape=[1] * 100_000), "its header is broken"),
    "negative side": (lie(shape=[-64]), "its header is broken"),
    "half a side": (lie(shape=[64.5]), "its header is broken"),
    "true as a side": (lie(shape=[True] * 2), "its header is broken"),
    "no shape": (lie(shape=None), "its header is broken"),
    "negative offsets": (lie(data_offsets=[-256, 0]), "its header is broken"),
    "offsets backwards": (lie(data_offsets=[256, 0]), "its header is broken"),
    "offsets beyond the end": (lie(data_offsets=[2**40, 2**40 + 256]), "tensors overlap or leave gaps"),
    "offsets beyond all numbers": (lie(data_offsets=[2**80, 2**80 + 256]), "tensors overlap or leave gaps"),
    "overlapping": (lambda model: rewrite(model, shift), "tensors overlap or leave gaps"),
    "other width": (lie(dtype="F16"), "can't be F16 of shape (64,) in 256 bytes"),
    "unknown type": (lie(dtype="F4"), "values of type 'F4', which is unknown"),
    "type that is no name": (lie(dtype=["F32"]), "its header is broken"),
    "integers for weights": (retype(f"{LAYER}.weight", np.int32), f"{LAYER}.weight is I32 and has no scales"),
    "bytes for weights": (retype(f"{LAYER}.weight", np.uint8), f"{LAYER}.weight is U8 and has no scales"),
    "doubles for weights": (retype(f"{LAYER}.weight", np.float64), f"{LAYER}.weight is F64 and has no scales"),
    "100 000 tensors": (crowd, "tensors, more than the 50000 a file may have"),
    "deep header": (lambda model: (model / WEIGHTS).write_bytes(struct.pack("<Q", 9000) + b"[" * 9000), "broken"),
    "a billion layers": (configure(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but there are only"),
    "endless config": (
        lambda model: os.truncate(model / "config.json", models.LARGEST_JSON + 1),
        "not valid JSON",
    ),
    "pipe": (pipe, "pipe"),
}


def damaged(sound: Path, target: Path, name: str) -> Path:
    model = shutil.copytree(sound, target)
    FAULTS[name][0](model)
    return model


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_model_is_refused_from_its_headers(tiny_student: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(FolderFault) as refused:
        read_folder(damaged(tiny_student, tmp_path / "model", name))
    assert FAULTS[name][1] in refused.value.problem


def test_a_type_may_differ_where_scales_go_with_it(tiny_student: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_student, tmp_path / "model")
    weights = load_file(model / WEIGHTS)
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"].astype(np.uint32)
    weights[f"{LAYER}.scales"] = np.zeros(1, np.float16)
    save_file(weights, model / WEIGHTS, metadata={"format": "mlx"})
    assert read_folder(model).tensors[f"{LAYER}.weight"].dtype == "U32"


def test_a_header_is_judged_in_a_moment(tiny_student: Path, tmp_path: Path) -> None:
    import time

    model = damaged(tiny_student, tmp_path / "model", "100 000 tensors")
    began = time.process_time()
    with pytest.raises(FolderFault):
        read_header(model / WEIGHTS)
    assert time.process_time() - began < 5


@pytest.fixture
def client(local: LocalDaemon) -> Iterator[Client]:
    with local.client() as client:
        yield client


# What can only be seen when the model is built comes on top of the table.
BUILT: dict[str, Callable[[Path], object]] = {
    "hidden size": configure(hidden_size=10**12),
    "vocabulary": configure(vocab_size=10**12),
    "heads": configure(num_attention_heads=10**9, num_key_value_heads=10**9),
    "negative": configure(hidden_size=-64),
    "text": configure(hidden_size="x"),
    "other sizes": configure(hidden_size=32),
}


@pytest.mark.parametrize("name", [*FAULTS, *BUILT])
def test_the_daemon_refuses_it_with_the_reason_and_stays_up(
    client: Client, local: LocalDaemon, tiny_student: Path, tmp_path: Path, name: str
) -> None:
    pid = local.pid
    model = shutil.copytree(tiny_student, tmp_path / "model")
    (FAULTS[name][0] if name in FAULTS else BUILT[name])(model)
    with pytest.raises(OpdError) as refused:
        list(client.load_teacher(str(model)))
    expected = {Reason.TEACHER_LOAD_FAILED, Reason.OUT_OF_MEMORY} if name in BUILT else {Reason.TEACHER_LOAD_FAILED}
    assert refused.value.reason in (expected if name != "pipe" else {Reason.PATH_NOT_ALLOWED})
    assert client.teacher()[0] in ("UNLOADED", "FAILED")
    assert local.pid == pid


def test_after_all_that_a_sound_model_loads(client: Client, tmp_path: Path) -> None:
    *_, last = client.load_teacher(str(write_tiny_qwen2(tmp_path / "sound", seed=1)))
    assert last.phase == "ready"
    client.unload_teacher()


def test_a_model_never_brings_code(tiny_student: Path, tmp_path: Path, client: Client) -> None:
    """Neither as a model of its own nor as a tokenizer of its own."""
    model = shutil.copytree(tiny_student, tmp_path / "model")
    proof = tmp_path / "it ran"
    (model / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    for file, entry in (
        ("config.json", {"model_file": "own.py"}),
        ("config.json", {"auto_map": {"AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}),
    ):
        before = (model / file).read_text()
        (model / file).write_text(json.dumps({**json.loads(before), **entry}))
        try:
            list(client.load_teacher(str(model)))
        except OpdError as refused:
            assert refused.reason is Reason.TEACHER_LOAD_FAILED  # noqa: PT017 - it may load without its code, too
        (model / file).write_text(before)
    assert not proof.exists()
