"""On a GPU: the losses of a CPU, bit-identical weights after any interruption, and no step that synchronizes.

`make gpu` runs these tests. Without a GPU they are skipped; `test_speed.py` covers what can be tested without one.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_speed import losses
from torch import Tensor
from torch._dynamo.utils import counters
from triton_reference import attend_reference, kept_weights

from langmlm.model import roberta, triton_attention
from langmlm.model.triton_attention import attend_triton, token_bounds
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


def test_the_triton_kernel_is_used(create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "In bf16 and for these head sizes, unless it is switched off: then FlashAttention takes its place."
    calls = []
    for name in ("attend_triton", "attend_varlen"):
        original = getattr(roberta, name)
        monkeypatch.setattr(
            roberta, name, lambda *arguments, name=name, call=original: calls.append(name) or call(*arguments)
        )
    for enabled, expected in ((True, "attend_triton"), (False, "attend_varlen")):
        calls.clear()
        monkeypatch.setattr(triton_attention, "_ENABLED", enabled)
        create(tmp_path / expected, bf16=True).train()
        assert set(calls) == {expected}


def test_fallback(data, create, resume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "FlashAttention gives the losses of a CPU, and a resumed run ends with the same bits."
    monkeypatch.setattr(triton_attention, "_ENABLED", False)
    test_losses_equal_those_of_a_cpu(data, tmp_path / "losses", {"bf16": True}, 0.05)
    test_resumed_equals_uninterrupted(create, resume, tmp_path / "resumed", {})


LENGTHS = [0, 3, 5, 17, 1, 64, 0, 65, 130, 300, 2, 0]


def attention_inputs(size: int, dtype: torch.dtype, heads: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    "Query, key and value as a model has them, the bounds of their tokens, and a gradient of the output."
    tokens, generator = sum(LENGTHS), torch.Generator("cuda").manual_seed(size)
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int().cuda()
    drawn = torch.randn(4, tokens, heads, size, device="cuda", generator=generator).to(dtype)
    return [tensor.requires_grad_() for tensor in drawn[:3]], token_bounds(cu_seqlens, tokens), drawn[3]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_attention_equals_the_reference(size: int, dtype: torch.dtype, tolerance: float, dropout: float):
    "Output and gradients of the Triton kernel, relative to the largest value, against float64 with the same mask."
    inputs, bounds, gradient = attention_inputs(size, dtype)
    dropped, doubles = round(dropout * 256), [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    output = attend_triton(*inputs, bounds, dropout, seed=torch.tensor([11], device="cuda"))
    kept = kept_weights(11, 3, len(output), dropped) if dropped else None
    expected = attend_reference(*doubles, bounds.cpu(), size**-0.5, kept, dropped)
    found = output, *torch.autograd.grad(output, inputs, gradient)
    wanted = expected, *torch.autograd.grad(expected, doubles, gradient.cpu().double())
    for ours, theirs in zip(found, wanted):
        assert (ours.detach().cpu().double() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_attention_repeats_every_bit():
    "Twice the same seed: the same output and gradients; another seed: others."
    inputs, bounds, gradient = attention_inputs(64, torch.bfloat16)
    results = []
    for seed in (1, 1, 2):
        output = attend_triton(*inputs, bounds, 0.1, seed=torch.tensor([seed], device="cuda"))
        results.append((output, *torch.autograd.grad(output, inputs, gradient)))
    assert all(map(torch.equal, results[0], results[1])) and not any(map(torch.equal, results[0], results[2]))


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
