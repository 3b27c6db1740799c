"""What a forward keeps for its backward: bytes, and for how many blocks it keeps them. Imports no MLX.

Modes of `config.backward`: "plain" keeps everything, "layerwise" only every block's input, "checkpoint" everything for
the upper half of the adapted blocks; "auto" as much as an eighth of the memory holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd_daemon.config import Backward, LoraConfig
    from opd_daemon.distill.adapter import AdapterConfig
    from opd_daemon.distill.shape import Shape

KEPT_SHARE = 8
ADAPTED_LINEARS = 7


def kept_blocks(mode: Backward, adapted: int, each: int, memory_bytes: int) -> int:
    """For how many of the adapted blocks a forward keeps everything, when that takes `each` bytes a block."""
    if mode == "plain":
        return adapted
    if mode == "checkpoint":
        return adapted // 2
    if mode == "layerwise":
        return 0
    return min(adapted, memory_bytes // KEPT_SHARE // max(1, each))


def block_bytes(
    shape: Shape, sequences: int, length: int, adapter: LoraConfig | AdapterConfig, *, on_host: bool
) -> int:
    """Bytes one block keeps besides its input, of so many sequences of `length` tokens, padding included.

    Counted for a decoder block (norm, attention, norm, SwiGLU) with every linear layer adapted: within 4 % of what MLX
    holds for Llama, Qwen2 and Qwen3 on a CPU. on_host: MLX computes on the CPU, where attention keeps its probabilities
    and a float32 SwiGLU only its inputs.
    """
    value, hidden, inner = shape.value_bytes, shape.hidden, shape.inner
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    float32, cut = value == 4, value == 4 and on_host
    inputs = queries + inner + 5 * hidden  # of the seven linear layers
    kept = value * (hidden + (2 if cut else 4) * inner + queries + 2 * keys) + 4 * ADAPTED_LINEARS * adapter.rank
    # An adapter computes in float32. A base that does too shares its inputs with it, unless dropout makes them differ.
    if not float32:
        kept += 4 * (inputs + hidden)
    elif adapter.dropout:
        kept += 4 * inputs
    else:
        kept += 4 * (queries + 2 * hidden + (0 if cut else inner))
    if adapter.dropout:
        kept += value * inputs
    if adapter.dora:
        kept += value * (queries + 2 * keys + 2 * hidden + 2 * inner)
    if on_host:
        kept += 4 * shape.heads * length
    dense = shape.block_parameters * value if adapter.dora and shape.bits else 0
    return int(sequences * length * kept + dense)
