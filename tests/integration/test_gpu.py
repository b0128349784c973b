"""On a GPU: the losses of a CPU, the same weights however often a run is stopped, and no step that waits.

`make gpu` runs them. Elsewhere they are skipped, and `test_speed.py` shows what can be shown without one.
"""

from pathlib import Path

import pytest
import torch
from test_speed import losses
from torch._dynamo.utils import counters

from langmlm.train.loop import take_batches, take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"bf16": False}, 1e-3),
        ({"bf16": True}, 0.05),
        ({"fp16": True}, 0.05),
        ({"bf16": True, "torch_compile": True}, 0.05),
        ({"bf16": True, "gradient_checkpointing": True}, 0.05),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_losses_are_those_of_a_cpu(data, tmp_path: Path, settings: dict, tolerance: float):
    "Whatever the precision, and compiled or not, to rounding."
    expected = losses(data, tmp_path / "cpu", use_cpu=True, bf16=False)
    assert losses(data, tmp_path / "gpu", **settings) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optim": "muon"}, {"torch_compile": True}, {"per_device_train_batch_size": 128, "num_train_epochs": 40}],
    ids=["adamw", "muon", "compiled", "thousands of tokens"],
)
def test_resumed_equals_uninterrupted(create, resume, tmp_path: Path, settings: dict):
    "In bf16 and with dropout, stopped in the middle: every bit of every weight."
    straight = create(tmp_path / "straight", bf16=True, **settings)
    straight.train()
    create(tmp_path / "stopped", bf16=True, **settings).train(stop_at_step=4)
    resumed = resume(tmp_path / "stopped")
    assert resumed.run.step == 4 < resumed.run.plan.total_steps
    resumed.train()
    weights = resumed.run.stock.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in straight.run.stock.state_dict().items())


def test_compiled_once_and_recorded(create, tmp_path: Path):
    "All batches of a run, those at the end of an epoch too, have one shape: one graph of calls, and it is recorded."
    torch._dynamo.reset()
    counters.clear()
    task = create(tmp_path / "run", bf16=True, torch_compile=True)
    task.train()
    assert task.run.recorded and task.run.plan.locate(task.run.step - 1)[0] > 0
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]


def test_a_step_waits_for_nothing(create, tmp_path: Path):
    "PyTorch is asked to refuse whatever makes the host wait for the device."
    run = create(tmp_path / "run", bf16=True).run
    take_step(run, take_batches(run, 0), learning_rate=1e-3)  # Libraries are loaded, and may wait
    data = take_batches(run, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(run, data, learning_rate=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.unlogged) == 2
