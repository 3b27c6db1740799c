"""What this machine does with models of certain shapes: measured once, in a process of its own, and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from opd_daemon.distill.files import write_file
from opd_daemon.distill.planning import RunFacts
from opd_daemon.distill.rates import MeasuredRates
from opd_daemon.errors import OpdError
from opd_daemon.memory_limit import training_environment

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "opd_daemon.runs.measurement")
# A machine that hasn't answered by then is busy with something else.
PATIENCE_SECONDS = 240.0
# Models of few layers have this share of the real ones' memory at most, or nothing is measured.
LARGEST_SHARE = 0.5
LIBRARIES = ("mlx", "mlx-lm", "numpy", "opd-daemon")
OBJECTIVE = ("signal", "support", "top_k", "top_mass", "divergence", "divergence_options", "backward", "optimizer")
ADAPTER = ("rank", "keys", "dora", "dropout")


class Calibrations:
    """The measurements in one file, by machine, versions, model shapes and what is computed with them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._measuring = threading.Lock()

    def rates(self, facts: RunFacts, *, measure: bool) -> MeasuredRates | None:
        """Rates for a run's models; None where they aren't known and can't or shan't be measured."""
        key = key_of(facts)
        kept = self._kept(key)
        if kept is not None or not measure or not _small_enough(facts):
            return kept
        with self._measuring:
            kept = self._kept(key)
            if kept is None and (found := _measure(facts)):
                self._keep(key, found)
                kept = found
        return kept

    def _kept(self, key: str) -> MeasuredRates | None:
        entry = self._content().get(key)
        try:
            return MeasuredRates(**entry["rates"]) if entry else None
        except (KeyError, TypeError):  # of another version
            return None

    def _keep(self, key: str, rates: MeasuredRates) -> None:
        content = {**self._content(), key: {"rates": rates.to_json()}}
        try:
            write_file(self._file, (json.dumps(content, indent=1) + "\n").encode())
        except OpdError as error:
            log.warning("the measurement of this machine is not kept (%s); the next plan repeats it", error)

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def key_of(facts: RunFacts) -> str:
    """What a measurement depends on, as a digest."""
    config, pair = facts.config, facts.pair
    described = {
        "machine": [platform.machine(), platform.system(), psutil.cpu_count(), psutil.virtual_memory().total],
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", ""),
        "versions": [metadata.version(name) for name in LIBRARIES],
        "student": asdict(pair.student),
        "teacher": asdict(pair.teacher),
        "objective": {name: getattr(config, name) for name in OBJECTIVE},
        "tempered": config.temperature != 1,
        "adapter": {name: getattr(config.lora, name) for name in ADAPTER},
        "recomputes": facts.recomputes,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _small_enough(facts: RunFacts) -> bool:
    models = [facts.pair.student, facts.pair.teacher]
    needed = sum(2 * (model.head_bytes + model.rest_bytes) + 3 * model.block_bytes for model in models)
    return needed < LARGEST_SHARE * psutil.virtual_memory().available


def _measure(facts: RunFacts) -> MeasuredRates | None:
    request = facts.config.model_dump_json().encode()
    try:
        done = subprocess.run(
            COMMAND,
            input=request,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=True,
            env=training_environment(),
        )
        return MeasuredRates(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        log.warning("measuring this machine took longer than %.0f s; plans use typical rates", PATIENCE_SECONDS)
    except (OSError, subprocess.CalledProcessError, ValueError, TypeError, IndexError) as error:
        last = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()[-1:]
        log.warning("this machine could not be measured (%s); plans use typical rates", last[0] if last else error)
    return None
