"""Whether memory suffices for a model, and how it shows when it ran out."""

from __future__ import annotations

import psutil

from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.folder import ModelFolder

# Activations, KV cache and the allocator's own pool beside the weights.
WORKING_BYTES = 512 << 20
OUT_OF_MEMORY_SIGNS = ("malloc", "alloc", "out of memory", "insufficient memory")


def check_memory(folder: ModelFolder, freed_bytes: int) -> None:
    """Raise OUT_OF_MEMORY when the weights can't fit beside what runs already; `freed_bytes` will be given back."""
    needed = folder.weight_bytes + WORKING_BYTES
    available = psutil.virtual_memory().available + freed_bytes
    if needed > available:
        raise OpdError(
            Reason.OUT_OF_MEMORY,
            f"{folder.name}: needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available; "
            "close other programs or use a quantised or smaller model",
            needed_bytes=needed,
            available_bytes=available,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX or Python ran out of memory; MLX only says so in its message."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY_SIGNS)
    )


def out_of_memory(what: str) -> OpdError:
    """The error for work that memory ran out on."""
    return OpdError(
        Reason.OUT_OF_MEMORY, f"{what}: memory ran out; send shorter or fewer sequences, or close other programs"
    )
