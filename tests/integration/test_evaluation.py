"An evaluation measures the model and does not change the run."

from pathlib import Path

import pytest
from helpers import same_weights
from conftest import ARCHITECTURE, SETTINGS
from datasets import DatasetDict, load_from_disk
from test_processes import train_in_processes

from langmlm import tasks
from langmlm.config import ConfigError

EVALUATION = ("eval_loss", "eval_accuracy", "eval_perplexity")


@pytest.fixture(scope="module")
def split_data(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "The data of the other tests, saved by `datasets`, with a validation split of a fifth."
    folder = tmp_path_factory.mktemp("split")
    rows = load_from_disk(data["tokenized_dataset"])["train"]
    split = rows.train_test_split(test_size=0.2, seed=1)
    DatasetDict(train=split["train"], validation=split["test"]).save_to_disk(folder / "dataset")
    return {"tokenizer": data["tokenizer"], "tokenized_dataset": folder / "dataset"}


def train(data: dict[str, Path], folder: Path, stop_at_step: int | None = None, **changes) -> tasks.MLMTask:
    "Train a small model."
    settings = {**SETTINGS, "output_dir": folder, **changes}
    task = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings)
    task.train(stop_at_step)
    return task


def evaluations(task: tasks.MLMTask) -> list[tuple]:
    "The logged results on the validation split."
    found = [entry for entry in task.state.log_history if "eval_loss" in entry]
    return [(entry["step"], *(entry[name] for name in EVALUATION)) for entry in found]


@pytest.mark.parametrize("settings", [{}, {"packing": False, "bf16": True, "whole_word_masking": True}])
def test_evaluation_does_not_change_the_run(split_data, tmp_path: Path, settings: dict):
    "Weights are bit-identical with and without, interrupted or not; the validation loss falls."
    without = train(split_data, tmp_path / "without", **settings)
    with_it = train(split_data, tmp_path / "with", eval_steps=2, **settings)
    train(split_data, tmp_path / "stopped", stop_at_step=3, eval_steps=2, **settings)
    resumed = tasks.create_mlm(**split_data, checkpoint_path=tmp_path / "stopped")
    resumed.train()
    for task in (with_it, resumed):
        assert same_weights(task, without)
    last = with_it.loader.plan.total_steps
    assert [step for step, *_ in evaluations(with_it)] == sorted({*range(2, last, 2), last})
    assert evaluations(resumed) == evaluations(with_it)
    assert evaluations(with_it)[-1][1] < evaluations(with_it)[0][1]
    assert not evaluations(without)


def test_two_processes_equal_one(split_data, tmp_path: Path):
    "Two processes share the split and measure what one measures, to rounding."
    found = []
    for number in (1, 2):
        settings = {**SETTINGS, "gradient_accumulation_steps": 2 // number, "use_cpu": True, "eval_steps": 3}
        given = {name: str(path) for name, path in split_data.items()} | {"model_config": ARCHITECTURE}
        given["training_config"] = settings | {"output_dir": str(tmp_path / f"run-{number}")}
        log = train_in_processes(number, given)
        found.append([[entry[name] for name in ("step", *EVALUATION)] for entry in log if "eval_loss" in entry])
    assert len(found[0]) > 2 and [step for step, *_ in found[0]] == [step for step, *_ in found[1]]
    for alone, shared in zip(*found):
        assert shared[1] == pytest.approx(alone[1], abs=1e-4)
        assert shared[2:] == pytest.approx(alone[2:], rel=0.02)


def test_missing_validation_split(data, tmp_path: Path):
    "The error names the remedy, before anything is written."
    with pytest.raises(ValueError, match="no split 'validation'.* tokenize with validation_fraction"):
        train(data, tmp_path / "run", eval_steps=2)
    assert not (tmp_path / "run").exists()


def test_longer_sequences_in_the_validation_split(data, tmp_path: Path):
    "A new model has positions for them; for a loaded one without, an error comes before anything is written."
    rows = load_from_disk(data["tokenized_dataset"])["train"]
    lengths = [len(ids) for ids in rows["input_ids"]]
    short = rows.select([index for index, length in enumerate(lengths) if length <= 20])
    long = rows.select([index for index, length in enumerate(lengths) if length > 20])
    DatasetDict(train=short, validation=long).save_to_disk(tmp_path / "dataset")
    split = {"tokenizer": data["tokenizer"], "tokenized_dataset": tmp_path / "dataset"}
    trained = train(split, tmp_path / "trained", max_steps=1)
    assert trained.model.config.max_position_embeddings == 22
    settings = {**SETTINGS, "output_dir": tmp_path / "run", "eval_steps": 2, "max_steps": 3}
    narrow = {"checkpoint_path": tmp_path / "trained" / "final_model"}, {"model_config": ARCHITECTURE | {"max_position_embeddings": 22}}
    for arguments in narrow:
        with pytest.raises(ConfigError, match=f"max_position_embeddings=22 is too small: sequences of {max(lengths)} tokens"):
            tasks.create_mlm(**split, **arguments, training_config=settings)
    assert not (tmp_path / "run").exists()
    for size in (1, SETTINGS["per_device_train_batch_size"]):  # With 1, they are longer than a micro-batch
        changed = settings | {"per_device_train_batch_size": size, "output_dir": tmp_path / f"run-{size}"}
        task = tasks.create_mlm(**split, model_config=ARCHITECTURE, training_config=changed)
        task.train()
        assert task.model.config.max_position_embeddings == max(lengths) + 2
        assert evaluations(task)


def test_unknown_ids_in_the_validation_split(data, tmp_path: Path):
    "Ids beyond the vocabulary are found before the model is built, too."
    rows = load_from_disk(data["tokenized_dataset"])["train"].select(range(8))
    wrong = rows.map(lambda row: {"input_ids": [*row["input_ids"][:-1], 60_000]})
    DatasetDict(train=rows, validation=wrong).save_to_disk(tmp_path / "dataset")
    with pytest.raises(ValueError, match="contains the id 60000, but the tokenizer has only 500 tokens"):
        train({**data, "tokenized_dataset": tmp_path / "dataset"}, tmp_path / "run", eval_steps=2)
