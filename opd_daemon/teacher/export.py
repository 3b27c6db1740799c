"""The teacher's output head as plain arrays, so that a worker can turn hidden states into exact logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.split import OutputHead, SplitModel
from opd_daemon.trainer import TeacherHead

TENSORS = ("weight", "scales", "biases", "bias")


def export_head(parts: SplitModel) -> TeacherHead:
    """The tensors of a model's head as it holds them, bfloat16 as uint16 bit patterns, and what follows the product.

    Raises:
        OpdError: HIDDEN_NOT_SUPPORTED when the head can't be split off, or is a layer of an unknown kind.
    """
    head = parts.head
    if not isinstance(head, OutputHead):
        raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, parts.refusal)
    layer = head.layer
    if not isinstance(layer, nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding):
        message = "the teacher's head is a layer whose weights can't be served; use top_k instead"
        raise OpdError(Reason.HIDDEN_NOT_SUPPORTED, message)
    found = {name: layer[name] for name in TENSORS if name in layer}
    tensors = {name: _host(tensor) for name, tensor in found.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("mlx.core.") for name, tensor in found.items()}
    exported = TeacherHead(tensors, dtypes, logit_scale=head.logit_scale, soft_cap=head.soft_cap)
    if "scales" not in found:
        return exported
    mode = getattr(layer, "mode", "affine")
    return replace(exported, group_size=layer.group_size, bits=layer.bits, mode=mode)


def _host(tensor: mx.array) -> npt.NDArray[Any]:
    return np.array(tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor)
