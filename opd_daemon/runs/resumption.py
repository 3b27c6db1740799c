"""Where a run goes on: its newest complete checkpoint, and what that makes of the run's row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from opd_daemon.distill.checkpoints import RunProgress, latest, read_progress
from opd_daemon.home import RunFolders
from opd_daemon.types import Run


@dataclass(frozen=True, slots=True)
class Resumption:
    """The checkpoint to go on from, None for the start, and where the run stood there."""

    checkpoint: Path | None
    progress: RunProgress

    @classmethod
    def find(cls, folders: RunFolders) -> Resumption:
        """Look at the run's checkpoints; blocks."""
        checkpoint = latest(folders.checkpoints)
        return cls(checkpoint, read_progress(checkpoint) if checkpoint else RunProgress())

    def rewound(self, run: Run) -> Run:
        """The run as it stood there. Its later metrics and checkpoints have to go too: `Store.rewind`."""
        return replace(
            run,
            step=self.progress.step,
            checkpoint_step=self.progress.step if self.checkpoint else None,
            best_step=self.progress.best_step,
        )
