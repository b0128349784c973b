"A model that FSDP2 shards over two processes trains, is saved and resumed like a whole one."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import train_in_processes
from transformers import AutoModelForMaskedLM

from conftest import ARCHITECTURE, HANG, SETTINGS
from langmlm import tasks

# As `accelerate launch --use_fsdp --fsdp_version 2` sets them
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
DEEPER = ARCHITECTURE | {"num_hidden_layers": 3}  # Two layers are units of their own, and the last is not


def settings(folder: Path, number: int, **changes) -> dict:
    "Return options with a global batch of 4 micro-batches, whose last step in an epoch has fewer."
    common = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 100, "use_cpu": True}
    return {**SETTINGS, **common, "gradient_accumulation_steps": 4 // number, "output_dir": str(folder), **changes}


def assert_same_losses(history: list[dict], expected: list[dict]) -> None:
    "The logged losses and gradient norms agree to rounding, as do evaluations."
    assert [entry["step"] for entry in history] == [entry["step"] for entry in expected]
    for one, two in zip(history, expected):
        for name in {"loss", "grad_norm", "eval_loss", "eval_accuracy"} & two.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), (one["step"], name)


def tensors(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


@pytest.fixture
def given(data) -> dict:
    return {name: str(path) for name, path in data.items()} | {"model_config": DEEPER}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "bf16": True}, {"optim": "adamw_torch"}])
def test_losses_are_those_of_one_process(given: dict, tmp_path: Path, changes: dict):
    "Data, masks, dropout, losses, gradient norms and the saved tensors are those of a whole model, to rounding."
    changes = changes | {"max_steps": 8}
    histories = []
    for number, environment in ((1, {}), (2, FSDP)):
        options = given | {"training_config": settings(tmp_path / f"run-{number}", number, **changes)}
        histories.append(train_in_processes(number, options, environment=environment))
    assert len(histories[0]) == 8
    exact = "bf16" not in changes
    if exact:
        assert_same_losses(histories[1], histories[0])
    else:
        assert [e["loss"] for e in histories[1]] == pytest.approx([e["loss"] for e in histories[0]], rel=2e-2)
    whole, sharded = (tmp_path / f"run-{number}" / "checkpoint-8" for number in (1, 2))
    assert [file.name for file in sorted(sharded.iterdir())] == [file.name for file in sorted(whole.iterdir())]
    for name in ("model", "optimizer"):
        one, two = tensors(whole, name), tensors(sharded, name)
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].shape == two[key].shape and two[key].dtype == one[key].dtype
            if exact:
                assert torch.allclose(one[key], two[key], atol=2e-4), key
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run-2" / "final_model")
    assert type(model).__name__ == "RobertaForMaskedLM" and model.config.num_hidden_layers == 3
