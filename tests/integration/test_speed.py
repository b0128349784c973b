"""What makes a run faster does not change its results."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import RobertaForMaskedLM

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.model import attention, roberta
from langmlm.model.layers import FastDropout
from langmlm.train.loop import train_step

ARCHITECTURE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # A compiled model draws other masks
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture
def even_data(tmp_path: Path) -> dict[str, Path]:
    "Sequences of one length: batches differ in the number of predictions only, so that few of the graphs are compiled again."
    words = random.Random(0).choices("red green blue black white brown".split(), k=64 * 14)
    text = "\n".join(" ".join(words[start : start + 14]) for start in range(0, len(words), 14))
    (tmp_path / "data.txt").write_text(text, encoding="utf-8")
    data = {"tokenizer": tmp_path / "tokenizer", "tokenized_dataset": tmp_path / "dataset"}
    config = {"vocab_size": 300, "max_length": 16, "path_to_save_tokenizer": data["tokenizer"]}
    tasks.create_tokenizer(tmp_path / "data.txt", config | {"path_to_save_dataset": data["tokenized_dataset"]}).train()
    assert set(open_dataset(data["tokenized_dataset"]).lengths) == {16}
    return data


def losses(data: dict[str, Path], folder: Path, layers: int = 2, **changes) -> list[float]:
    "The loss of every step of a small run."
    settings, architecture = {**SETTINGS, "output_dir": folder, **changes}, {**ARCHITECTURE, "num_hidden_layers": layers}
    task = tasks.create_mlm(**data, model_config=architecture | NO_DROPOUT, training_config=settings)
    return [entry["loss"] for entry in task.train().log_history]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_uncompiled(even_data, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The loss of every step is that of the uncompiled model, and the model was indeed compiled.

    One layer takes half the time; so does code without vector instructions, which Inductor would have to look for.
    """
    counters.clear()
    changes = {"layers": 1, "bf16": False, "gradient_accumulation_steps": 1}
    plain = losses(even_data, tmp_path / "plain", **changes)
    assert not counters["stats"]["unique_graphs"] and "bit for bit" not in caplog.text
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        compiled = losses(even_data, tmp_path / "compiled", torch_compile=True, **changes)
    assert counters["stats"]["unique_graphs"] and "not reproducible bit for bit: torch_compile=True" in caplog.text
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_bf16_equals_float32(data, tmp_path: Path):
    "In bf16 the loss of every step is that of float32, to the rounding of bf16."
    plain = losses(data, tmp_path / "plain", bf16=False)
    narrow = losses(data, tmp_path / "narrow", bf16=True)
    assert narrow != plain and narrow == pytest.approx(plain, abs=0.02)


def record_call(names: list[str], name: str, function: Callable, *arguments):
    "Call a function, and remember its name."
    names.append(name)
    return function(*arguments)


@pytest.fixture(params=["triton", "flash"])
def step_without_values(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """An optimizer step as on a GPU, on tensors that have shapes but no values: reading a value fails.

    With the Triton kernel and with FlashAttention, of which only the shapes of their outputs are computed.

    The tensors claim to be on a CPU, because without a GPU PyTorch computes no gradients of others; so what is only
    done on CPUs is patched out.
    """
    monkeypatch.setattr(roberta, "arrange_rows", lambda *_: None)
    monkeypatch.setattr(roberta, "has_triton_kernel", lambda *_: request.param == "triton")
    monkeypatch.setattr(attention, "_has_flash_attention", lambda _: True)
    used = []
    for name, function in (("triton", "attend_triton"), ("flash", "attend_varlen")):
        original = getattr(roberta, function)
        monkeypatch.setattr(roberta, function, partial(record_call, used, name, original))
    monkeypatch.setattr(FastDropout, "forward", nn.Dropout.forward)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)

    def take(optim: str) -> Tensor:
        settings = SETTINGS | {"output_dir": tmp_path / optim, "bf16": True, "optim": optim}
        real = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings)
        step_batches = real.loader.load(0)
        with FakeTensorMode() as fake:
            task = tasks.MLMTask(RobertaForMaskedLM(real.model.config), real.tokenizer, real.dataset, real.config)
            batches = [
                (index, replace(batch, **{name: fake.from_tensor(part) for name, part in vars(batch).items()}))
                for index, batch in step_batches.batches
            ]
            without_values = replace(step_batches, batches=batches)
            metrics = train_step(task.module, task.optimizer, task.accelerator, without_values, 0, 1e-3, task.config)
        assert used and set(used) == {request.param}
        return metrics

    return take


def test_a_step_does_not_synchronize(step_without_values):
    "Forward pass, backward pass and update are handed to the device without reading a value from it."
    assert step_without_values("adamw_torch_fused").shape == (3,)
    with pytest.raises(DataDependentOutputException):  # The other optimizers check whether the gradient is finite
        step_without_values("muon")
