"Every field of a config does something; none is only accepted."

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE, SETTINGS
from safetensors.torch import load_file

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.model.roberta import ModelConfig
from langmlm.train.config import TrainingConfig

CHANGES_WEIGHTS = {
    "num_train_epochs": 3,
    "max_steps": 5,
    "per_device_train_batch_size": 8,
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
KEEPS_WEIGHTS = {  # To rounding
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
SEEN_ELSEWHERE = {
    "fp16",
    "n_gpus",
    "run_name",
    "output_dir",
    "logging_dir",
    "report_to",
    "torch_compile",
    "eval_steps",
}  # Lessons of planning, tests of processes, trackers, speed and evaluation


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    "The final weights of a run with the settings of the other tests."
    return train(data, tmp_path_factory.mktemp("expected"))


def train(data: dict[str, Path], folder: Path, **changes) -> dict[str, torch.Tensor]:
    "Train a small model, and read its final weights."
    tasks.create_mlm(
        **data, model_config=ARCHITECTURE, training_config={**SETTINGS, "output_dir": folder / "run", **changes}
    ).train()
    return load_file(folder / "run" / "final_model" / "model.safetensors")


def largest_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    "Over all weights."
    return max((mine[name] - theirs[name]).abs().max().item() for name in theirs)


def test_no_field_is_forgotten():
    "The tables of this page have every field of the config."
    assert {
        entry.name for entry in fields(TrainingConfig)
    } == CHANGES_WEIGHTS.keys() | KEEPS_WEIGHTS.keys() | SEEN_ELSEWHERE


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_changes_the_weights(data, tmp_path: Path, expected: dict, name: str):
    "The run goes another way."
    assert largest_difference(train(data, tmp_path, **{name: CHANGES_WEIGHTS[name]}), expected) > 1e-5


@pytest.mark.parametrize("name", KEEPS_WEIGHTS)
def test_keeps_the_weights(data, tmp_path: Path, expected: dict, name: str):
    "The run goes the same way, to rounding."
    assert largest_difference(train(data, tmp_path, **{name: KEEPS_WEIGHTS[name]}), expected) < 1e-4


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"save_steps": 3, "save_total_limit": 2}, 2), ({"save_strategy": "no"}, 0), ({"save_strategy": "epoch"}, 2)],
)
def test_checkpoints(data, tmp_path: Path, changes: dict, steps: int):
    "As many checkpoints are left as were asked for."
    train(data, tmp_path, **changes)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == steps


def test_architecture_reaches_the_model(data, tmp_path: Path):
    "Every key of the model's config is in the config that is saved."
    given = {
        "vocab_size": 600, "max_position_embeddings": 40, "num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80,
        "hidden_act": "relu", "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "layer_norm_eps": 1e-6, "initializer_range": 0.05,
        "type_vocab_size": 2, "tie_word_embeddings": False, "classifier_dropout": 0.4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "use_cache": False, "is_decoder": False, "add_cross_attention": False,
    }  # fmt: skip
    assert given.keys() == {entry.name for entry in fields(ModelConfig)}
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
    "Each option makes another dataset from the same text; the number of workers does not."
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
