"A model that FSDP2 shards over two processes trains, is saved and resumed like a whole one."

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from forks import forked_python
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


@pytest.fixture(scope="module")
def given(data, tmp_path_factory) -> dict:
    "The arguments of `create_mlm`, with a dataset that has a validation split."
    folder = tmp_path_factory.mktemp("sharding") / "dataset"
    config = {"max_length": 32, "validation_fraction": 0.2, "path_to_save_dataset": folder}
    tasks.create_tokenizer(data["tokenizer"].parent / "data.txt", config, tokenizer=data["tokenizer"]).train()
    return {"tokenizer": str(data["tokenizer"]), "tokenized_dataset": str(folder), "model_config": DEEPER}


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


def test_resuming_with_and_without_shards(given: dict, tmp_path: Path):
    "One process, two with shards, then two with whole models: the losses are those of one uninterrupted run."
    evaluating = {"max_steps": 9, "eval_steps": 3, "probe_sentences": ["the <mask>"]}
    complete = train_in_processes(1, given | {"training_config": settings(tmp_path / "run", 1, **evaluating)})
    folder = tmp_path / "stopped"
    train_in_processes(1, given | {"training_config": settings(folder, 1, **evaluating)}, stop_at_step=3)
    resumed = {name: value for name, value in given.items() if name != "model_config"}
    resumed |= {"checkpoint_path": str(folder), "training_config": {"output_dir": str(folder)}}
    train_in_processes(2, resumed, stop_at_step=6, environment=FSDP)
    assert json.loads((folder / "trainer_state.json").read_text())["langmlm"]["environment"]["sharded"] is True
    history = train_in_processes(2, resumed)
    assert_same_losses(history, complete)
    assert sum("eval_loss" in entry for entry in history) == sum("filled_masks" in entry for entry in history) == 3


SCRIPT = """
import os, sys
from langmlm import tasks
from langmlm.train.spikes import handle_loss_spike, LossSpike

task = tasks.create_mlm(**GIVEN)
before = {name: weight.full_tensor().clone() for name, weight in task.model.named_parameters()}
assert task.estimate(1).steps_left == 6
share = sum(weight.to_local().numel() for weight in task.model.parameters())
assert share < 0.6 * task.model.num_parameters(), share
for name, weight in task.model.named_parameters():
    assert weight.full_tensor().equal(before[name]), "an estimate must undo its steps"
task.train(stop_at_step=4)
table = task.worst_tokens(rows=2, min_count=1)  # Computed by a whole copy, in every process
assert len(table) == 2
saved = {name: weight.full_tensor().clone() for name, weight in task.model.named_parameters()}
task.train(stop_at_step=6)
spike, checkpoints = LossSpike(4, "the loss is high"), task.run_folder.rollback_checkpoints(task.state)
event = handle_loss_spike(spike, task.model, task.optimizer, task.accelerator, task.state, task.config, checkpoints, None)
assert event["rollback"]["to_step"] == 4, event
for name, weight in task.model.named_parameters():
    assert weight.full_tensor().equal(saved[name]), "a rollback must restore the weights"
steps = {int(state["step"]) for state in task.optimizer.state.values()}
assert steps == {4}, steps
"""


def launch(tmp_path: Path, options: dict, *arguments: str) -> subprocess.CompletedProcess:
    "Run the script with `accelerate launch`, as a user would."
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("GIVEN", repr(options)))
    launcher = [forked_python(), "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2"]
    rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [*launcher, *rest, *arguments, script]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment)


def test_accelerate_launch(given: dict, tmp_path: Path):
    "A script is launched with shards; it estimates, trains, looks at tokens and rolls back. FSDP1 is an error."
    options = given | {"training_config": settings(tmp_path / "run", 2, max_steps=6, eval_steps=100)}
    finished = launch(tmp_path, options, "--fsdp_version", "2")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "run" / "superseded-checkpoint-6" / "model.safetensors").is_file()  # After the rollback
    options["training_config"]["output_dir"] += "-1"
    finished = launch(tmp_path, options)
    assert finished.returncode and "launch with --fsdp_version 2: FSDP1 is not supported" in finished.stderr
    assert not (tmp_path / "run-1").exists()
