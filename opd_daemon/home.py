"""Where things lie on disk: `$OPD_HOME`, by default `~/.opd`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def user_path(written: str) -> Path:
    """A path as a person wrote it, with `~` expanded; the `~` of a user unknown here stays, and names nothing."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


@dataclass(frozen=True, slots=True)
class RunFolders:
    """Every place one run writes to."""

    config: Path
    checkpoints: Path
    rollouts: Path
    train_metrics: Path
    eval_metrics: Path
    token_tables: Path
    samples: Path
    report: Path
    worker_log: Path

    @property
    def pictures(self) -> Path:
        """Folder of the report's pictures."""
        return self.report.with_suffix("")


@dataclass(frozen=True, slots=True)
class Home:
    """The daemon's folder tree. Properties name places; nothing is created until it is written to."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """The home named by `$OPD_HOME`, else `~/.opd`."""
        return cls(Path(os.environ.get("OPD_HOME") or Path.home() / ".opd").expanduser().absolute())

    def make(self) -> None:
        """Make the folder, for its owner alone: prompts and models lie in it. One that is there stays as it is."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)

    @property
    def runtime(self) -> Path:
        """Socket, lock and discovery file of the live daemon; mode 0700."""
        return self.root / "run"

    @property
    def discovery(self) -> Path:
        """`daemon.json`: how a client finds the daemon; mode 0600."""
        return self.runtime / "daemon.json"

    @property
    def lock(self) -> Path:
        """Held by the one daemon of this home; contains its pid."""
        return self.runtime / "daemon.lock"

    @property
    def socket(self) -> Path:
        """Unix socket of the daemon, where the path is short enough for one."""
        return self.runtime / "opd.sock"

    @property
    def database(self) -> Path:
        """SQLite store of runs and events."""
        return self.root / "opd.db"

    @property
    def teacher_cache(self) -> Path:
        """Content-addressed teacher results, shared by all runs."""
        return self.root / "teacher_cache"

    @property
    def digest_memo(self) -> Path:
        """Digests of model files already hashed."""
        return self.root / "digests.json"

    @property
    def calibration(self) -> Path:
        """What was measured of this machine, for plans."""
        return self.root / "calibration.json"

    @property
    def models(self) -> Path:
        """Models `ListModels` shows besides those runs have used."""
        return self.root / "models"

    @property
    def uploads(self) -> Path:
        """Files of prompts that clients on other machines have sent."""
        return self.root / "uploads"

    @property
    def logs(self) -> Path:
        """Log files of the daemon and its workers."""
        return self.root / "logs"

    def run(self, run_id: str) -> RunFolders:
        """The places of one run."""
        return RunFolders(
            config=self.root / "configs" / f"{run_id}.yaml",
            checkpoints=self.root / "checkpoints" / run_id,
            rollouts=self.root / "student_rollouts" / f"{run_id}.jsonl",
            train_metrics=self.root / "metrics" / f"{run_id}_train.jsonl",
            eval_metrics=self.root / "metrics" / f"{run_id}_eval.jsonl",
            token_tables=self.root / "metrics" / f"{run_id}_tokens.json",
            samples=self.root / "metrics" / f"{run_id}_samples.jsonl",
            report=self.root / "reports" / f"{run_id}.html",
            worker_log=self.logs / f"{run_id}.log",
        )
