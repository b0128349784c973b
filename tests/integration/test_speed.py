"""What makes a run faster must not make it another run."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import RobertaForMaskedLM

from langmlm import tasks
from langmlm.model import attention
from langmlm.model import roberta as model
from langmlm.model.compile import compile_model
from langmlm.model.layers import FastDropout
from langmlm.train.state import Run
from langmlm.train.loop import take_batches, take_step

ARCHITECTURE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # A compiled model draws in its own way
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
}


def losses(data: dict[str, Path], folder: Path, **changes) -> list[float]:
    "The loss of every step of a small run."
    settings = {**SETTINGS, "output_dir": folder, **changes}
    task = tasks.create_mlm(**data, model_config=ARCHITECTURE | NO_DROPOUT, training_config=settings)
    return [entry["loss"] for entry in task.train().log_history]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_not_compiled(data, tmp_path: Path):
    "The loss of every step is that of the model that is not compiled, and compiling was not passed over."
    plain = losses(data, tmp_path / "plain", bf16=False)
    assert not counters["stats"]["unique_graphs"]
    compiled = losses(data, tmp_path / "compiled", bf16=False, torch_compile=True)
    assert counters["stats"]["unique_graphs"]
    assert compiled == pytest.approx(plain, abs=1e-4)


class Doubled(nn.Module):
    "Something to compile."

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2


@pytest.mark.parametrize("forgiving", [False, True])
def test_what_cannot_be_compiled(forgiving: bool, monkeypatch: pytest.MonkeyPatch):
    "Where nobody asked for compiling, a failure of it is not one of the run."

    def fail(*_):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(GraphLowering, "run", fail)
    module, hidden = Doubled(), torch.randn(3)
    with torch._dynamo.config.patch(suppress_errors=False), torch._inductor.config.patch(force_disable_caches=True):
        compile_model(module, torch.device("cpu"), forgiving=forgiving)
        with nullcontext() if forgiving else pytest.raises(Exception, match="there is no compiler"):
            assert torch.equal(module(hidden), hidden * 2)


def test_narrow_equals_wide(data, tmp_path: Path):
    "In bf16 the loss of every step is that of float32, to the rounding of bf16."
    plain = losses(data, tmp_path / "plain", bf16=False)
    narrow = losses(data, tmp_path / "narrow", bf16=True)
    assert narrow != plain and narrow == pytest.approx(plain, abs=0.02)


def use_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    "Have attention take the way of a GPU."
    monkeypatch.setattr(model, "group_equal_lengths", lambda *_: None)
    monkeypatch.setattr(model, "has_varlen_kernel", lambda _: True)


@pytest.fixture
def step_without_values(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step as a GPU takes it, on tensors that have shapes and no values: where the host asks for one, it fails.

    The tensors say that they are on a CPU, for without a GPU PyTorch differentiates nothing that says otherwise; so
    what is only done on CPUs is taken out.
    """
    use_kernel(monkeypatch)
    monkeypatch.setattr(FastDropout, "forward", nn.Dropout.forward)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)

    def take(optim: str) -> Run:
        settings = SETTINGS | {"output_dir": tmp_path / optim, "bf16": True, "optim": optim}
        real = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings).run
        prepared = take_batches(real, step=0)
        with FakeTensorMode() as fake:
            run = Run(RobertaForMaskedLM(real.stock.config), real.tokenizer, real.corpus, real.config)
            batches = [
                (number, replace(batch, **{name: fake.from_tensor(part) for name, part in vars(batch).items()}))
                for number, batch in prepared.batches
            ]
            take_step(run, replace(prepared, batches=batches), learning_rate=1e-3)
        return run

    return take


def test_a_step_on_a_gpu_waits_for_nothing(step_without_values):
    "Forward, backward and update are handed to the device without asking it for a single number."
    run = step_without_values("adamw_torch_fused")
    assert [numbers.shape for numbers in run.unlogged] == [(3,)]
    with pytest.raises(DataDependentOutputException):  # The other optimizers ask whether the gradient is a number
        step_without_values("muon")


def stand_in(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, dropout: float, scale: float):
    "What the kernel gives without dropout, where there is none; what it leaves for its way back has no contents."
    attended = attention.attend_by_sequence(query, key, value, cu_seqlens, scale=scale)
    return attended, torch.empty(0), torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)


def stand_in_backward(gradient, query, key, value, cu_seqlens, attended, log_sums, random_state, unused, *settings):
    "The gradients of attention, written out."
    _, _, scale = settings
    gradients, bounds = [torch.empty_like(part) for part in (query, key, value)], cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:]):
        q, k, v, g = (part[start:end].transpose(0, 1) for part in (query, key, value, gradient))
        weights = torch.softmax(q @ k.mT * scale, -1)
        to_weights = g @ v.mT
        to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale
        for part, made in zip(gradients, (to_scores @ k, to_scores.mT @ q, weights.mT @ g)):
            part[start:end] = made.transpose(0, 1)
    return tuple(gradients)


def test_the_kernel_is_compiled_with_the_model(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "With something in the kernel's place, loss and gradients are those of a CPU, in one graph for the whole model."
    attention._kernel.register_kernel("cpu")(stand_in)
    attention._kernel_backward.register_kernel("cpu")(stand_in_backward)
    settings = SETTINGS | {"output_dir": tmp_path / "run", "bf16": False}
    run = tasks.create_mlm(**data, model_config=ARCHITECTURE | NO_DROPOUT, training_config=settings).run
    ((_, batch),) = take_batches(run, step=0).batches[:1]

    def loss_and_gradients(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
        module.zero_grad()
        loss = module(**vars(batch))
        loss.backward()
        return loss.detach(), [weight.grad for weight in module.parameters() if weight.grad is not None]

    expected, gradients = loss_and_gradients(run.module)
    use_kernel(monkeypatch)
    compiled = torch.compile(run.module, backend="aot_eager", fullgraph=True)
    loss, others = loss_and_gradients(compiled)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(others, gradients)
