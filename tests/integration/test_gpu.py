"""On a GPU: the losses of a CPU, bit-identical weights after any interruption, and no step that synchronizes.

`make gpu` runs these tests. Without a GPU they are skipped; `test_speed.py` covers what can be tested without one.
"""

from pathlib import Path

import pytest
import torch
from test_speed import losses
from torch._dynamo.utils import counters

from langmlm.train.loop import train_step

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
def test_losses_equal_those_of_a_cpu(data, tmp_path: Path, settings: dict, tolerance: float):
    "To rounding, in every precision, compiled or not."
    expected = losses(data, tmp_path / "cpu", use_cpu=True, bf16=False)
    assert losses(data, tmp_path / "gpu", **settings) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optim": "muon"}, {"torch_compile": True}, {"per_device_train_batch_size": 128, "num_train_epochs": 40}],
    ids=["adamw", "muon", "compiled", "thousands of tokens"],
)
def test_resumed_equals_uninterrupted(create, resume, tmp_path: Path, settings: dict):
    "In bf16 and with dropout, stopped in the middle: all weights are bit-identical."
    straight = create(tmp_path / "straight", bf16=True, **settings)
    straight.train()
    create(tmp_path / "stopped", bf16=True, **settings).train(stop_at_step=4)
    resumed = resume(tmp_path / "stopped")
    assert resumed.state.step == 4 < resumed.loader.plan.total_steps
    resumed.train()
    weights = resumed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in straight.model.state_dict().items())


def test_compiled_once_with_cuda_graphs(create, tmp_path: Path):
    "All batches of a run have one shape, at the end of an epoch too: one graph, and CUDA graphs are captured."
    torch._dynamo.reset()
    counters.clear()
    task = create(tmp_path / "run", bf16=True, torch_compile=True)
    task.train()
    assert all(weight.grad is not None for weight in task.model.parameters())  # Zeroed in place, for CUDA graphs
    assert task.loader.plan.locate(task.state.step - 1)[0] > 0
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]


def test_a_step_does_not_synchronize(create, tmp_path: Path):
    "PyTorch raises an error for whatever makes the host wait for the device."
    task = create(tmp_path / "run", bf16=True)
    parts = (task.module, task.optimizer, task.accelerator)
    train_step(*parts, task.loader.load(0), 0, 1e-3, task.config)  # Libraries are loaded, which may synchronize
    step_batches = task.loader.load(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = train_step(*parts, step_batches, 1, 1e-3, task.config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.shape == (3,)
