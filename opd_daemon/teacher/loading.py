"""Bringing a model's weights into memory, on the engine's thread."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from opd_daemon.models.folder import ModelFolder
from opd_daemon.models.host import use_host_activations
from opd_daemon.models.host_decoder import Decoder, decoder_of
from opd_daemon.models.split import SplitModel, split
from opd_daemon.teacher import mlxlm
from opd_daemon.teacher.folder import load_failed
from opd_daemon.teacher.memory import is_out_of_memory, out_of_memory
from opd_daemon.teacher.scoring import score_batch
from opd_daemon.teacher.sharing import can_share
from opd_daemon.types import ScoreRequest, ScoreWants


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A frozen model in memory. `vocab_size` is the tokenizer's, at most the logits' width.

    shares_prefixes: whether what sequences begin with may be computed once for all of them. decoder: computes the
    next token's logits.
    """

    model: Any
    parts: SplitModel
    vocab_size: int
    weight_bytes: int
    shares_prefixes: bool
    decoder: Decoder


def check_architecture(folder: ModelFolder) -> None:
    """Raise TEACHER_LOAD_FAILED when mlx-lm has no such model type or its configuration lacks something."""
    kind = folder.config["model_type"]
    try:
        _, arguments = mlxlm.module("utils")._get_classes(folder.config)  # noqa: SLF001 - nothing public finds a model's class
    except ValueError as error:
        raise load_failed(folder.name, f"mlx-lm has no model type {kind!r} (config.json)") from error
    try:
        arguments.from_dict(folder.config)
    except (TypeError, ValueError, KeyError) as error:
        raise load_failed(folder.name, f"config.json doesn't describe a {kind} model: {_cause(error)}") from error


def load(folder: ModelFolder, vocab_size: int, report: Callable[[float], None]) -> LoadedModel:
    """Load, freeze and split the model; `report` gets the fraction of the weights in memory.

    Raises TEACHER_LOAD_FAILED when weights and configuration don't fit, OUT_OF_MEMORY when memory ran out.
    """
    try:
        model, _ = mlxlm.module("utils").load_model(folder.path, lazy=True)
        _evaluate(model, report)
        model.freeze()
        model.eval()
        use_host_activations(model)
        parts = split(model, vocab_size)
        shares = can_share(model, parts, vocab_size)
        decoder = decoder_of(model, parts)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(folder.name) from error
        raise load_failed(folder.name, _cause(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise load_failed(folder.name, f"the weights don't fit config.json: {_cause(error)}") from error
    return LoadedModel(model, parts, min(vocab_size, parts.width), folder.weight_bytes, shares, decoder)


def warm(loaded: LoadedModel) -> None:
    """Score a few tokens once, so that the first real call finds everything compiled."""
    request = ScoreRequest(np.zeros(16, np.int32), 1, ScoreWants(top_k=1))
    for _ in score_batch(loaded, [request], piece=16):
        pass


def free_memory() -> None:
    """Give the memory of dropped arrays back to the system."""
    gc.collect()
    mx.clear_cache()


def wire(weight_bytes: int) -> None:
    """Let Metal keep the weights and 2 GiB of work resident; does nothing on other devices."""
    limit = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
    if limit is not None:
        mx.set_wired_limit(min(weight_bytes + (2 << 30), int(limit)) if weight_bytes else 0)


def _evaluate(model: Any, report: Callable[[float], None]) -> None:
    arrays: list[mx.array] = [array for _, array in cast(list[tuple[str, Any]], tree_flatten(model.parameters()))]
    total, done = sum(array.nbytes for array in arrays) or 1, 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        report(done / total)


def _cause(error: BaseException) -> str:
    # mlx's message on weights is a heading line, then one line a tensor.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300].rstrip(",. ") or "it gives no reason"
