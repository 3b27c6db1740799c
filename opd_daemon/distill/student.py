"""The model being taught: a frozen base with trainable LoRA layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, load_tokenizer

from opd_daemon.config import LoraConfig
from opd_daemon.distill.adapter import CONFIG, LEAVES, WEIGHTS, AdapterConfig, read_adapter_config
from opd_daemon.distill.files import write_file
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.errors import OpdError, Reason

Head = Callable[[mx.array], mx.array]

# Differently shaped matrix products round differently; a head that does anything else to its logits is far off this.
SPLIT_TOLERANCE = 1e-2


class Student:
    """A student model. Everything but its adapter is frozen.

    model, tokenizer: as mlx-lm loads them. eos_ids: every id that ends a completion. adapter: its settings.
    vocabulary: mask applied to all logits; `mask_vocabulary` narrows it. vocab_size: the tokenizer's real size; width:
    number of logits. layers, hidden_size: the model's.
    """

    def __init__(self, model: Any, tokenizer: Any, adapter: AdapterConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.eos_ids: tuple[int, ...] = tuple(sorted(tokenizer.eos_token_ids))
        self._body, self._head = split_head(model)
        states = self._body(mx.zeros((1, 1), dtype=mx.int32))
        self.layers = len(model.layers)
        self.hidden_size = int(states.shape[-1])
        self.width = int(self._head(states).shape[-1])
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, self.width)
        self.vocabulary = VocabularyMask(self.width, range(self.vocab_size, self.width))

    @classmethod
    def load(
        cls, base_path: Path, adapter_path: Path | None, lora: LoraConfig, *, seed: int, float32: bool = False
    ) -> Student:
        """Load the base, freeze it, and put an adapter on: the one in `adapter_path`, else a fresh LoRA.

        float32 casts the base. The same seed gives the same fresh adapter.

        Raises:
            OpdError: INVALID_RUN_CONFIG when the adapter doesn't fit, MODEL_NOT_FOUND when the base can't be built.
        """
        try:
            model, config = load_model(base_path, lazy=False)
            tokenizer = load_tokenizer(base_path, eos_token_ids=config.get("eos_token_id"))
        except (ValueError, FileNotFoundError, KeyError, TypeError) as fault:
            raise OpdError(Reason.MODEL_NOT_FOUND, f"{base_path}: can't be loaded: {fault}", path=base_path) from fault
        if float32:
            model.set_dtype(mx.float32)
        model.freeze()
        mx.random.seed(seed)
        adapter = (
            read_adapter_config(adapter_path)
            if adapter_path
            else AdapterConfig(
                "lora", lora.num_layers, lora.rank, lora.scale, lora.dropout, _keys(lora), str(base_path)
            )
        )
        dora = adapter.fine_tune_type == "dora"
        linear_to_lora_layers(model, adapter.num_layers, adapter.lora_parameters, use_dora=dora)
        student = cls(model, tokenizer, adapter)
        student.check_trainable()
        if adapter_path:
            student.load_adapter(adapter_path / WEIGHTS)
        model.eval()
        mx.eval(model.parameters())
        return student

    def parameters(self) -> dict[str, mx.array]:
        """The trainable tensors, by name."""
        return dict(tree_flatten(self.parameters_tree()))

    def parameters_tree(self) -> Any:
        """The trainable tensors, as the tree gradients and optimizers use."""
        return self.model.trainable_parameters()

    def check_trainable(self) -> None:
        """Make sure that adapter tensors, and nothing else, are trainable.

        Raises:
            OpdError: INVALID_RUN_CONFIG when the LoRA keys name no layer of the model.
        """
        trainable = self.parameters()
        if not trainable:
            keys = ", ".join(self.adapter.keys or ())
            names = sorted(
                {name for layer in self.model.layers for name, _ in layer.named_modules() if "_proj" in name}
            )
            message = f"lora.keys ({keys}) name no layer of this model; it has {', '.join(names[:8])}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, keys=keys)
        strange = [name for name in trainable if name.rpartition(".")[2] not in LEAVES]
        if strange:
            raise OpdError(Reason.INTERNAL, f"{strange[0]} of the base model is trainable; only the adapter may be")

    def mask_vocabulary(self, hidden: Iterable[int], width: int | None = None) -> None:
        """Give further ids no mass, and keep only the first `width` columns of the logits."""
        width = min(width or self.width, self.width)
        self.vocabulary = VocabularyMask(width, [*hidden, *range(self.vocab_size, width)])

    def hidden(self, tokens: mx.array) -> mx.array:
        """States after the final norm: tokens `(B, T)` → `(B, T, D)`. Padding goes to the right of a sequence."""
        return self._body(tokens)

    def states_at(self, tokens: mx.array, places: mx.array) -> mx.array:
        """States at some of the B·T positions of tokens `(B, T)`: places `(N,)` → `(N, D)`."""
        hidden = self.hidden(tokens)
        return hidden.reshape(-1, hidden.shape[-1])[places]

    def head(self, rows: mx.array) -> mx.array:
        """Masked float32 logits of hidden states: `(N, D)` → `(N, V)`."""
        return self.vocabulary(self._head(rows))

    def logits(self, tokens: mx.array) -> mx.array:
        """Masked float32 logits: tokens `(B, T)` → `(B, T, V)`."""
        return self.vocabulary(self._head(self._body(tokens)))

    def load_adapter(self, path: Path) -> None:
        """Take the adapter's tensors from a safetensors file, as float32.

        Raises:
            OpdError: INVALID_RUN_CONFIG naming the first tensor that is missing, unknown or of another shape.
        """
        stored: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        own = self.parameters()
        for name in sorted(own.keys() | stored.keys()):
            if name not in own:
                problem = f"{name} has no place in the student"
            elif name not in stored:
                problem = f"{name} is missing"
            elif stored[name].shape != own[name].shape:
                problem = f"{name} has shape {stored[name].shape}, the student needs {own[name].shape}"
            else:
                continue
            raise OpdError(Reason.INVALID_RUN_CONFIG, f"{path}: {problem}", path=path, tensor=name)
        self.update({name: tensor.astype(mx.float32) for name, tensor in stored.items()})

    def update(self, tensors: dict[str, mx.array]) -> None:
        """Replace trainable tensors."""
        self.model.update(tree_unflatten(list(tensors.items())))
        mx.eval(self.parameters_tree())

    def save_adapter(self, folder: Path) -> None:
        """Write `adapters.safetensors` and `adapter_config.json` into a folder, as mlx-lm loads them.

        Raises:
            OpdError: DISK_FULL, or INVALID_REQUEST where the folder can't be written to; no half file is left.
        """
        from safetensors.numpy import save

        tensors = {name: np.array(tensor) for name, tensor in sorted(self.parameters().items())}
        write_file(folder / WEIGHTS, save(tensors, metadata={"format": "mlx"}))
        write_file(folder / CONFIG, self.adapter.to_json().encode())

    def base_digest(self) -> str:
        """sha256 over every frozen tensor: the same before and after training, or the base was touched."""
        trainable = self.parameters().keys()
        digest = hashlib.sha256()
        for name, tensor in sorted(dict(tree_flatten(self.model.parameters())).items()):
            if name not in trainable:
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
                digest.update(np.ascontiguousarray(np.array(tensor.view(mx.uint8))).data)
        return digest.hexdigest()


def split_head(model: Any) -> tuple[Head, Head]:
    """The model as body and output head, proved by running both ways on a few tokens.

    Heads with anything behind the matrix (soft-caps, scales) fail the proof; then the body is the whole model and the
    head does nothing.
    """
    body = getattr(model, "model", None)
    embedding = getattr(body, "embed_tokens", None)
    head = getattr(model, "lm_head", None) or getattr(embedding, "as_linear", None)
    if body is not None and head is not None:
        tokens = mx.arange(1, 9, dtype=mx.int32)[None]
        whole = model(tokens).astype(mx.float32)
        difference = mx.abs(head(body(tokens)).astype(mx.float32) - whole).max()
        if difference <= SPLIT_TOLERANCE * mx.abs(whole).max():
            return body, head
    return model, lambda rows: rows


def _keys(lora: LoraConfig) -> tuple[str, ...] | None:
    return None if lora.keys is None else tuple(lora.keys)
