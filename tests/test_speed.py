"""What makes a run faster must not make it another run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import RobertaForMaskedLM

from langmlm import model, tasks
from langmlm.dropout import FastDropout
from langmlm.run import Run
from langmlm.training import take_batches, take_step

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


def test_narrow_equals_wide(data, tmp_path: Path):
    "In bf16 the loss of every step is that of float32, to the rounding of bf16."
    plain = losses(data, tmp_path / "plain", bf16=False)
    narrow = losses(data, tmp_path / "narrow", bf16=True)
    assert narrow != plain and narrow == pytest.approx(plain, abs=0.02)


@pytest.fixture
def step_without_values(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step as a GPU takes it, on tensors that have shapes and no values: where the host asks for one, it fails.

    The tensors say that they are on a CPU, for without a GPU PyTorch differentiates nothing that says otherwise; so
    what is only done on CPUs is taken out.
    """
    monkeypatch.setattr(model, "equal_blocks", lambda *_: None)
    monkeypatch.setattr(model, "has_kernel", lambda _: True)
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
    assert [losses.shape for losses in run.unlogged] == [(3,)]
    with pytest.raises(DataDependentOutputException):  # The other optimizers ask whether the gradient is a number
        step_without_values("muon")
