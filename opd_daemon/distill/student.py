"""The model being taught: a frozen base with trainable LoRA layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_config, load_model, load_tokenizer

from opd_daemon.config import LoraConfig
from opd_daemon.distill.adapter import (
    CARD,
    CONFIG,
    LEAVES,
    WEIGHTS,
    AdapterConfig,
    dora_fault,
    read_adapter_config,
    weights_file,
)
from opd_daemon.distill.blocks import Blocks
from opd_daemon.distill.files import write_file
from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.model_card import CardFacts, card_text
from opd_daemon.distill.peft import BLOCK_LAYER, PEFT_WEIGHTS, mlx_name, peft_name, peft_settings
from opd_daemon.distill.shape import Shape, in_float32, shape_of
from opd_daemon.distill.tape import drivable_blocks
from opd_daemon.distill.workload import STUDENT_DECODES
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import read_folder
from opd_daemon.models.host import use_host_activations
from opd_daemon.models.host_decoder import Decoder, decoder_of
from opd_daemon.models.split import split

LOAD_FAULTS = (ValueError, FileNotFoundError, KeyError, TypeError)


class Student:
    """A student model. Everything but its adapter is frozen.

    model, tokenizer: as mlx-lm loads them. eos_ids: every id that ends a completion. adapter: its settings.
    vocabulary: mask applied to all logits; `mask_vocabulary` narrows it. vocab_size: the tokenizer's real size; width:
    number of logits. layers, hidden_size: the model's. parts: body and head, where they can be told apart. shape: the
    base model's sizes. first_digest: of the base, when it was asked for first. largest_batch: most sequences decoded at
    once.
    """

    def __init__(self, model: Any, tokenizer: Any, adapter: AdapterConfig, shape: Shape) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.shape = shape
        self.first_digest = ""
        self.largest_batch = STUDENT_DECODES
        self.eos_ids: tuple[int, ...] = tuple(sorted(tokenizer.eos_token_ids))
        known = max(tokenizer.get_vocab().values()) + 1
        self.parts = split(model, known)
        self._body, self._head = self.parts.body, self.parts.head
        self.layers = len(model.layers)
        self.hidden_size = self.parts.hidden_size
        self.width = self.parts.width
        self.vocab_size = min(known, self.width)
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
        model, tokenizer = load_base(base_path, float32=float32)
        mx.random.seed(seed)
        folder = read_folder(base_path)
        adapter = read_adapter_config(adapter_path) if adapter_path else _fresh(lora, base_path)
        if adapter.dora and (fault := dora_fault(folder.bits)):
            raise OpdError(Reason.INVALID_RUN_CONFIG, f"{base_path}: {fault}", path=base_path)
        linear_to_lora_layers(model, adapter.num_layers, adapter.lora_parameters, use_dora=adapter.dora)
        use_host_activations(model)
        student = cls(model, tokenizer, adapter, shape_of(in_float32(folder) if float32 else folder))
        student.check_trainable()
        if adapter_path:
            student.load_adapter(weights_file(adapter_path))
        model.eval()
        mx.eval(model.parameters())
        return student

    @cached_property
    def blocks(self) -> Blocks | None:
        """The blocks, where gradients can be taken one block at a time; proved on first use."""
        return drivable_blocks(self.model, self.parts)

    @cached_property
    def decoder(self) -> Decoder:
        """What decodes a token for each of several sequences; proved on first use."""
        return decoder_of(self.model, self.parts)

    def parameters(self) -> dict[str, mx.array]:
        """The trainable tensors, by name."""
        return dict(tree_flatten(self.parameters_tree()))

    def parameters_tree(self) -> Any:
        """The trainable tensors, as the tree gradients and optimizers use."""
        return self.model.trainable_parameters()

    def check_trainable(self) -> None:
        """Make sure that adapter tensors, and nothing else, are trainable.

        Raises:
            OpdError: INVALID_RUN_CONFIG when the LoRA keys name no layer of the model, or one outside its blocks.
        """
        trainable = self.parameters()
        if not trainable:
            keys = ", ".join(self.adapter.keys or ())
            names = sorted(
                {name for layer in self.model.layers for name, _ in layer.named_modules() if "_proj" in name}
            )
            message = f"lora.keys ({keys}) name no layer of this model; it has {', '.join(names[:8])}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, keys=keys)
        flat: list[Any] = [tree_flatten(layer.trainable_parameters()) for layer in self.model.layers]
        inside = {id(tensor) for tensors in flat for _, tensor in tensors}
        if outside := [name for name, tensor in trainable.items() if id(tensor) not in inside]:
            message = f"{outside[0]} is outside the model's blocks; only layers inside them can be trained"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, tensor=outside[0])
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
        """Take the adapter's tensors from a safetensors file, mlx-lm's or PEFT's, as float32.

        Raises:
            OpdError: INVALID_RUN_CONFIG naming the first tensor that is missing, unknown or of another shape.
        """
        stored: Any = mx.load(str(path))
        if path.name == PEFT_WEIGHTS:
            stored = _in_mlx_form(stored)
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

    def save_adapter(self, folder: Path, card: CardFacts | None = None) -> None:
        """Write `adapters.safetensors` and `adapter_config.json` into a folder, as mlx-lm loads them.

        card: of a finished adapter, which is written in PEFT's form too, where that can hold it, and with its card.

        Raises:
            OpdError: DISK_FULL, or INVALID_REQUEST where the folder can't be written to; no half file is left.
        """
        from safetensors.numpy import save

        tensors = {name: np.array(tensor) for name, tensor in sorted(self.parameters().items())}
        peft = card is not None and all(
            tensor.ndim <= 2 and BLOCK_LAYER.search(name) for name, tensor in tensors.items()
        )
        settings = self._peft_settings(tensors) if peft else None
        if peft:
            theirs = {peft_name(name): np.ascontiguousarray(tensor.T) for name, tensor in tensors.items()}
            write_file(folder / PEFT_WEIGHTS, save(theirs, metadata={"format": "pt"}))
        write_file(folder / WEIGHTS, save(tensors, metadata={"format": "mlx"}))
        write_file(folder / CONFIG, self.adapter.to_json(settings).encode())
        if card is not None:
            kind = "DoRA" if self.adapter.dora else "LoRA"
            text = card_text(card, kind=kind, rank=self.adapter.rank, scale=self.adapter.scale, peft=peft)
            write_file(folder / CARD, text.encode())

    def _peft_settings(self, names: Iterable[str]) -> Any:
        adapter = self.adapter
        return peft_settings(
            rank=adapter.rank,
            scale=adapter.scale,
            dropout=adapter.dropout,
            dora=adapter.dora,
            base=adapter.model,
            names=names,
        )

    def base_digest(self) -> str:
        """sha256 over every frozen tensor: the same before and after training, or the base was touched."""
        trainable = self.parameters().keys()
        digest = hashlib.sha256()
        for name, tensor in sorted(dict(tree_flatten(self.model.parameters())).items()):
            if name not in trainable:
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
                digest.update(np.ascontiguousarray(np.asarray(tensor.view(mx.uint8))).data)
        self.first_digest = self.first_digest or digest.hexdigest()
        return digest.hexdigest()


def load_tokenizer_of(path: Path) -> Any:
    """Tokenizer of a model folder with all the model's EOS ids. Raises MODEL_NOT_FOUND when it can't be built."""
    try:
        return load_tokenizer(path, eos_token_ids=load_config(path).get("eos_token_id"))
    except LOAD_FAULTS as fault:
        raise OpdError(Reason.MODEL_NOT_FOUND, f"{path}: can't be loaded: {fault}", path=path) from fault


def load_base(path: Path, *, float32: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a base, frozen. Raises MODEL_NOT_FOUND when it can't be built."""
    try:
        model, config = load_model(path, lazy=False)
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except LOAD_FAULTS as fault:
        raise OpdError(Reason.MODEL_NOT_FOUND, f"{path}: can't be loaded: {fault}", path=path) from fault
    if float32:
        model.set_dtype(mx.float32)
    model.freeze()
    return model, tokenizer


def _fresh(lora: LoraConfig, base: Path) -> AdapterConfig:
    keys = None if lora.keys is None else tuple(lora.keys)
    kind = "dora" if lora.dora else "lora"
    return AdapterConfig(kind, lora.num_layers, lora.rank, lora.scale, lora.dropout, keys, str(base))


def _in_mlx_form(tensors: Any) -> dict[str, mx.array]:
    """PEFT's tensors under mlx-lm's names, turned as it holds them; others keep their names."""
    return {mlx_name(name) or name: tensor.T for name, tensor in tensors.items()}
