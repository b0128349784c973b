"""What makes a run faster must not make it another run."""

import shutil
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from langmlm import tasks

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
