"""The teacher's output head as plain arrays, so that a worker can turn hidden states into exact logits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import TeacherHead

TENSORS = ("weight", "scales", "biases", "bias")


def export_head(model: Any) -> TeacherHead:
    """The tensors of a model's head as it holds them; bfloat16 as uint16 bit patterns.

    Raises:
        OpdError: HIDDEN_NOT_SUPPORTED when the head is a layer of an unknown kind.
    """
    outer = getattr(model, "language_model", model)
    layer = outer.lm_head if hasattr(outer, "lm_head") else outer.model.embed_tokens
    if not isinstance(layer, nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding):
        message = f"the teacher's head is a {type(layer).__name__}, whose weights can't be served; use top_k instead"
        raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, message)
    found = {name: layer[name] for name in TENSORS if name in layer}
    tensors = {name: _host(tensor) for name, tensor in found.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("mlx.core.") for name, tensor in found.items()}
    if "scales" not in found:
        return TeacherHead(tensors, dtypes)
    return TeacherHead(tensors, dtypes, layer.group_size, layer.bits, getattr(layer, "mode", "affine"))


def _host(tensor: mx.array) -> npt.NDArray[Any]:
    return np.array(tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor)
