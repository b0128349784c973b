"""Every option of the three configs has an effect; none is accepted and then ignored.

Effects that cannot be read off the final weights have tests of their own below. The tests use the public API only.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
import pytest
import torch
from conftest import ARCHITECTURE, HANG, SETTINGS
from execute_notebooks import through_files
from forks import forked_python
from nbclient import NotebookClient
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.model.roberta import ModelConfig
from langmlm.train.config import TrainingConfig

SHORT = SETTINGS | {"num_train_epochs": 1}
CHANGES_WEIGHTS = {
    "num_train_epochs": 2,
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "packing": False,
    "mlm_probability": 0.3,
    "whole_word_masking": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.5,
    "warmup_steps": 4,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "max_grad_norm": 0.01,
    "seed": 7,
    "bf16": True,
    "optim": "muon",
}
KEEPS_WEIGHTS = {  # Up to rounding
    "optim": "adamw_torch",
    "gradient_checkpointing": True,
    "use_cpu": True,
    "logging_steps": 2,
    "save_strategy": "no",
    "save_steps": 3,
    "save_total_limit": 1,
    "on_loss_spike": "warn",
    "max_rollbacks": 0,
    "disable_tqdm": True,
}
TESTED_ELSEWHERE = {
    "fp16",
    "decay_ratio",
    "n_gpus",
    "run_name",
    "output_dir",
    "logging_dir",
    "report_to",
    "torch_compile",
    "eval_steps",
    "probe_sentences",
    "probe_held_out",
    "fill_batches",
    "recipe",
    "budget_minutes",
    "language",
    "license",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
    "hub_token",
}  # In the tests of training options, resuming, the recipe, the model card, uploads, processes, trackers, speed and evaluation


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    "Return the final weights of a run of one epoch with the default settings of the tests."
    return train(data, tmp_path_factory.mktemp("expected"))


def train(data: dict[str, Path], folder: Path, **changes) -> dict[str, torch.Tensor]:
    "Train a small model, and return its final weights."
    tasks.create_mlm(
        **data, model_config=ARCHITECTURE, training_config={**SHORT, "output_dir": folder / "run", **changes}
    ).train()
    return load_file(folder / "run" / "final_model" / "model.safetensors")


def largest_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    "Return the largest absolute difference over all weights."
    return max((mine[name] - theirs[name]).abs().max().item() for name in theirs)


def test_no_option_is_forgotten():
    "The tables above have every option."
    options = {entry.name for entry in fields(TrainingConfig)}
    assert options == CHANGES_WEIGHTS.keys() | KEEPS_WEIGHTS.keys() | TESTED_ELSEWHERE


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_changes_the_weights(data, tmp_path: Path, expected: dict, name: str):
    "The final weights are different."
    assert largest_difference(train(data, tmp_path, **{name: CHANGES_WEIGHTS[name]}), expected) > 1e-5


@pytest.mark.parametrize("name", KEEPS_WEIGHTS)
def test_keeps_the_weights(data, tmp_path: Path, expected: dict, name: str):
    "The final weights are the same, up to rounding."
    assert largest_difference(train(data, tmp_path, **{name: KEEPS_WEIGHTS[name]}), expected) < 1e-4


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"save_steps": 3, "save_total_limit": 2}, 2), ({"save_strategy": "no"}, 0), ({"save_strategy": "epoch", "num_train_epochs": 2}, 2)],
)
def test_checkpoints(data, tmp_path: Path, changes: dict, steps: int):
    "The number of checkpoints that remain is the one asked for."
    train(data, tmp_path, **changes)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == steps


def saved_bytes(data: dict[str, Path], folder: Path, **changes) -> int:
    "Return the bytes of activations that the forward passes of one step keep for the backward pass."
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    settings = {**SETTINGS, "max_steps": 1, "use_cpu": True, "save_strategy": "no", "output_dir": folder, **changes}
    task = tasks.create_mlm(**data, model_config={**ARCHITECTURE, "num_hidden_layers": 4}, training_config=settings)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.train()
    return sum(sizes)


def test_gradient_checkpointing_saves_memory(data, tmp_path: Path):
    "The forward pass keeps fewer activations."
    usual = saved_bytes(data, tmp_path / "usual")
    assert 0 < saved_bytes(data, tmp_path / "checkpointed", gradient_checkpointing=True) < 0.7 * usual


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch_fused", {("AdamW", True)}),
        ("adamw_torch", {("AdamW", False)}),
        ("muon", {("_StackedMuon", None), ("AdamW", True)}),
    ],
)
def test_optimizer(create, tmp_path: Path, optim: str, expected: set):
    "The optimizer and the kernel that step are those asked for."
    stepped = set()
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: stepped.add((type(optimizer).__name__, optimizer.defaults.get("fused")))
    )
    try:
        create(tmp_path, optim=optim, max_steps=1, save_strategy="no").train()
    finally:
        hook.remove()
    assert {(name, fused) for name, fused in stepped if name in ("AdamW", "_StackedMuon")} == expected


@pytest.mark.parametrize(
    ("disable_tqdm", "is_terminal", "shown"),
    [(None, False, False), (None, True, True), (True, True, False), (False, False, True)],
)
def test_disable_tqdm(
    create, tmp_path: Path, monkeypatch, capsys, disable_tqdm: bool | None, is_terminal: bool, shown: bool
):
    "True hides the progress bar of a terminal, False shows it everywhere, None shows it in terminals."
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    create(tmp_path, disable_tqdm=disable_tqdm, max_steps=1, save_strategy="no").train()
    assert ("%|" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("use_cpu", [True, False])
def test_use_cpu(create, tmp_path: Path, use_cpu: bool):
    "With a GPU in sight, the run is on the CPU if, and only if, it is told to be."
    gpu = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("cuda")}
    with (
        patch.multiple("torch.accelerator", **gpu),
        patch("accelerate.Accelerator.__init__", side_effect=InterruptedError) as accelerator,
        pytest.raises(InterruptedError),
    ):
        create(tmp_path, use_cpu=use_cpu, max_steps=1).train()
    assert accelerator.call_args.kwargs["cpu"] == use_cpu


def tables(cell: nbformat.NotebookNode) -> int:
    "Count the tables among the outputs of a cell."
    return sum("<table" in output.get("data", {}).get("text/html", "") for output in cell.outputs)


def test_notebook_shows_the_table_once(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A cell that ends in the history of a run shows its table once, live or at the end; a later cell shows it again."
    sources = []
    for name, disable_tqdm in (("live", None), ("end", True)):
        settings = {**SETTINGS, "output_dir": str(tmp_path / name), "max_steps": 6, "save_strategy": "no"}
        arguments = {name: str(path) for name, path in data.items()} | {"model_config": ARCHITECTURE}
        arguments["training_config"] = {**settings, "disable_tqdm": disable_tqdm}
        sources.append(f"from langmlm import tasks\nhistory = tasks.create_mlm(**{arguments}).train()\nhistory")
        sources.append("history")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    monkeypatch.setattr(sys, "executable", forked_python())  # Runs the kernel
    limits = {"timeout": HANG, "startup_timeout": HANG}
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, **limits, kernel_name="python3", config=through_files(folder)).execute()
    assert [tables(cell) for cell in notebook.cells] == [1, 1, 1, 1]


def test_architecture_reaches_the_model(data, tmp_path: Path):
    "Every option of the model is in the saved config."
    given = {
        "vocab_size": 600, "max_position_embeddings": 40, "num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80,
        "hidden_act": "relu", "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "layer_norm_eps": 1e-6, "initializer_range": 0.05,
        "type_vocab_size": 2, "tie_word_embeddings": False, "classifier_dropout": 0.4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "use_cache": False, "is_decoder": False, "add_cross_attention": False,
    }  # fmt: skip
    other_types = {"model_type", "local_attention", "global_attn_every_n_layers"}  # Tested in test_families.py
    options = {entry.name for entry in fields(ModelConfig)} - {"initialization"}  # Decides weights only
    assert given.keys() == options - other_types
    settings = {"max_steps": 1, "bf16": False, "output_dir": tmp_path / "run"}
    tasks.create_mlm(**data, model_config=given, training_config=settings).train()
    saved = json.loads((tmp_path / "run" / "final_model" / "config.json").read_text())
    assert {name: saved.get(name, given[name]) for name in given} == given
    weights = load_file(tmp_path / "run" / "final_model" / "model.safetensors")
    assert (
        weights["roberta.embeddings.word_embeddings.weight"].shape == (600, 48) and "lm_head.decoder.weight" in weights
    )


@pytest.mark.parametrize("changes", [{"long_lines": "truncate"}, {"max_length": 16}, {"vocab_size": 400}, {"min_frequency": 50}, {"max_train_bytes": 3_000}, {"special_tokens": ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Return"]}])  # fmt: skip
def test_tokenizer_options(data, tmp_path: Path, changes: dict):
    "Every option changes the dataset made from a text, except for the number of workers."
    text = data["tokenizer"].parent / "data.txt"
    common = {
        "vocab_size": 500,
        "max_length": 32,
        "path_to_save_tokenizer": tmp_path / "tokenizer",
        "path_to_save_dataset": tmp_path / "dataset",
    }
    tasks.create_tokenizer(text, {**common, "num_workers": 3}).train()
    assert open_dataset(tmp_path / "dataset").fingerprint == open_dataset(data["tokenized_dataset"]).fingerprint
    tasks.create_tokenizer(text, {**common, **changes}).train()
    assert open_dataset(tmp_path / "dataset").fingerprint != open_dataset(data["tokenized_dataset"]).fingerprint
