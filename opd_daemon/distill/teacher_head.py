"""The teacher's head in the student's process: hidden states in, exact logits out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opd_daemon.distill.logits import VocabularyMask, on_host
from opd_daemon.models.split import finish
from opd_daemon.trainer import TeacherHead
from opd_daemon.types import HiddenDtype


class HeadMatrix:
    """Turns the teacher's hidden states into masked float32 logits, with its weights exactly as it holds them.

    Outputs behind the vocabulary's width are left out of the matrix. On a CPU, which multiplies nothing else fast,
    16-bit numbers become float32, their values unchanged.
    """

    def __init__(self, head: TeacherHead, vocabulary: VocabularyMask) -> None:
        kept = {name: as_mlx(tensor[: vocabulary.width], head.dtypes[name]) for name, tensor in head.tensors.items()}
        self.tensors = {name: _multiplied_fast(tensor) for name, tensor in kept.items()}
        settings: dict[str, Any] = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
        self.quantisation = settings if head.bits else None
        self.logit_scale, self.soft_cap = head.logit_scale, head.soft_cap
        self.vocabulary = vocabulary
        mx.eval(self.tensors)

    @property
    def width(self) -> int:
        """Number of logits."""
        return int(self.tensors["weight"].shape[0])

    def __call__(self, states: mx.array) -> mx.array:
        """Logits `(N, V)` of states `(N, D)`."""
        weight, states = self.tensors["weight"], _multiplied_fast(states)
        if self.quantisation:
            logits = mx.quantized_matmul(
                states, weight, self.tensors["scales"], self.tensors.get("biases"), transpose=True, **self.quantisation
            )
        else:
            logits = states @ weight.T
        if "bias" in self.tensors:
            logits = logits + self.tensors["bias"]
        return self.vocabulary(finish(logits, self.logit_scale, self.soft_cap))


def as_mlx(values: npt.NDArray[Any], dtype: HiddenDtype | str) -> mx.array:
    """An MLX array of numpy values; bfloat16 comes as uint16 bit patterns."""
    array = mx.array(np.ascontiguousarray(values))
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def _multiplied_fast(tensor: mx.array) -> mx.array:
    return tensor.astype(mx.float32) if on_host() and tensor.dtype in {mx.float16, mx.bfloat16} else tensor
