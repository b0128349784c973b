"Compiling changes speed, not results; where it was not requested, its failure is not one of the run."

import os
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn

from langmlm.model import layers as compiling
from langmlm.model.layers import compile_model, should_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_should_compile(monkeypatch: pytest.MonkeyPatch):
    "An explicit choice holds; by default, only long runs on a GPU with Triton and a C compiler are compiled."
    assert [should_compile(choice, CPU, 10_000) for choice in (None, False, True)] == [False, False, True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(os.environ, "CC", "cc")
    monkeypatch.setattr(compiling, "find_spec", lambda _: True)
    assert [should_compile(None, GPU, batches) for batches in (100, 10_000)] == [False, True]
    monkeypatch.delitem(os.environ, "CC")
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    assert not should_compile(None, GPU, 10_000)
    monkeypatch.setitem(os.environ, "CC", "cc")
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    assert not should_compile(None, GPU, 10_000)


def test_cuda_graphs_on_a_single_gpu():
    "Gradients are allocated where CUDA graphs are captured, and parameter names stay."
    for device, processes, captured in ((CPU, 1, False), (GPU, 2, False), (GPU, 1, True)):
        module = nn.Linear(3, 2)
        names = list(module.state_dict())
        assert compile_model(module, device, processes) is captured
        assert (module.weight.grad is not None) is captured and list(module.state_dict()) == names
    assert not module.weight.grad.any()


class Doubled(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2


@pytest.mark.parametrize("fall_back", [False, True])
def test_failing_compiler(fall_back: bool, monkeypatch: pytest.MonkeyPatch):
    "With `fall_back`, a module that cannot be compiled runs as it is; torch._dynamo.config.suppress_errors exists."

    def fail(*_):
        raise RuntimeError("there is no compiler")

    assert torch._dynamo.config.suppress_errors is False
    monkeypatch.setattr("torch._inductor.graph.GraphLowering.run", fail)  # Imported here: it takes a second
    module, hidden = Doubled(), torch.randn(3)
    with torch._dynamo.config.patch(suppress_errors=False), torch._inductor.config.patch(force_disable_caches=True):
        compile_model(module, CPU, fall_back=fall_back)
        with nullcontext() if fall_back else pytest.raises(Exception, match="there is no compiler"):
            assert torch.equal(module(hidden), hidden * 2)
