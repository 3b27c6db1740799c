"""Memory that runs out inside the worker: what could be saved is saved, and the run goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_daemon.distill.checkpoints import latest, read_progress
from opd_daemon.distill.optimizer import Optimizer
from opd_daemon.errors import OpdError, Reason
from opd_daemon.trainer import TrainContext
from tests.plugins.test_trainers import TRAINERS, Bench, bench  # noqa: F401 - the fixture

NO_MEMORY = "[malloc] Unable to allocate 77 bytes."
METHOD = "dataset"


def failing(at_step: int, fault: Exception) -> Any:
    """The trainer that trains on the data's completions, until a step finds no memory."""
    info = TRAINERS[METHOD]

    class Failing:
        def train(self, context: TrainContext) -> None:
            take = context.loop._next_step

            def next_step() -> Any:
                step = take()
                if step.number == at_step:
                    raise fault
                return step

            context.loop._next_step = next_step  # type: ignore[method-assign]
            info.factory().train(context)

    return replace(info, factory=Failing)


def adapter(bench: Bench) -> dict[str, Any]:  # noqa: F811
    return load_file(bench.folders.checkpoints / "final" / "adapters.safetensors")


@pytest.mark.parametrize("fault", [RuntimeError(NO_MEMORY), MemoryError()], ids=["mlx", "numpy"])
def test_the_last_complete_step_is_saved_and_gone_on_from(bench: Bench, fault: Exception) -> None:  # noqa: F811
    settings = {"trainer": METHOD, "checkpoint_every": 100, "num_steps": 6, "batch_size": 4}
    bench.run(**settings)
    whole = adapter(bench)
    bench.folders.checkpoints.rename(bench.folders.checkpoints.with_name("whole"))

    refusal = raised(lambda: bench.run(info=failing(5, fault), **settings))
    assert refusal.reason is Reason.OUT_OF_MEMORY
    assert refusal.metadata["process"] == "worker"
    saved = latest(bench.folders.checkpoints)
    assert saved is not None
    assert read_progress(saved).step == 4
    complete, _ = bench.run(resume_from=saved, memory_halvings=1, **settings)
    assert complete
    for name, values in adapter(bench).items():
        np.testing.assert_allclose(values, whole[name], atol=1e-5)


def test_a_half_done_update_is_not_saved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    update = Optimizer.update

    def failing_update(self: Optimizer, gradients: Any, step: int) -> None:
        if step == 5:
            raise RuntimeError(NO_MEMORY)
        update(self, gradients, step)

    monkeypatch.setattr(Optimizer, "update", failing_update)
    refusal = raised(lambda: bench.run(trainer=METHOD, checkpoint_every=3))
    assert refusal.reason is Reason.OUT_OF_MEMORY
    saved = latest(bench.folders.checkpoints)
    assert saved is not None
    assert read_progress(saved).step == 3


def test_another_failure_is_no_lack_of_memory(bench: Bench) -> None:  # noqa: F811
    with pytest.raises(RuntimeError, match="something else"):
        bench.run(info=failing(5, RuntimeError("something else")), trainer=METHOD, checkpoint_every=100)


def raised(work: Callable[[], object]) -> OpdError:
    with pytest.raises(OpdError) as caught:
        work()
    return caught.value


def test_the_teachers_lack_of_memory_is_not_the_workers(bench: Bench) -> None:  # noqa: F811
    fault = OpdError(Reason.OUT_OF_MEMORY, "scoring: memory ran out")
    refusal = raised(lambda: bench.run(info=failing(2, fault), trainer=METHOD))
    assert refusal.metadata.get("process") != "worker"


def test_without_a_complete_step_there_is_nothing_to_save(bench: Bench) -> None:  # noqa: F811
    raised(lambda: bench.run(info=failing(1, MemoryError()), trainer=METHOD))
    assert latest(bench.folders.checkpoints) is None
