"""What the engine has done since the daemon started, and the memory it takes: figures for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class WorkTally:
    """Work that is done. The engine's thread alone counts; plain numbers may be read from anywhere."""

    batches: int = 0
    newest_batch: int = 0
    scored_sequences: int = 0
    scored_tokens: int = 0
    generated_tokens: int = 0

    def scored(self, sequences: int, tokens: int) -> None:
        """Count one batch."""
        self.batches += 1
        self.newest_batch = sequences
        self.scored_sequences += sequences
        self.scored_tokens += tokens


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of MLX's arrays: alive, freed but kept for reuse, and the most there were. All 0 before a model loads."""

    active: int = 0
    cached: int = 0
    peak: int = 0
