"A small tokenizer and dataset, made once, and runs on them."

import signal
from itertools import islice
from pathlib import Path

import pytest

from langmlm import tasks
from langmlm.text.corpus import docstrings

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell ignores it for what it starts with "&"

ARCHITECTURE = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 2e-3,
    "logging_steps": 3,
    "save_steps": 4,
    "bf16": False,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "The arguments of `create_mlm` that name data."
    folder = tmp_path_factory.mktemp("data")
    (folder / "data.txt").write_text("\n".join(islice(docstrings(), 150)), encoding="utf-8")
    config = {
        "vocab_size": 500,
        "max_length": 32,
        "path_to_save_tokenizer": folder / "tokenizer",
        "path_to_save_dataset": folder / "dataset",
    }
    tasks.create_tokenizer(folder / "data.txt", config).train()
    return {"tokenizer": folder / "tokenizer", "tokenized_dataset": folder / "dataset"}


@pytest.fixture
def create(data: dict[str, Path]):
    "Make a new run: `create(output_dir, **settings)`."

    def create_run(output_dir: Path, **changes) -> tasks.MLMTask:
        return tasks.create_mlm(
            **data, model_config=ARCHITECTURE, training_config={**SETTINGS, "output_dir": output_dir, **changes}
        )

    return create_run


@pytest.fixture
def resume(data: dict[str, Path]):
    "Go on with a run: `resume(checkpoint_path, **settings)`."

    def resume_run(checkpoint_path: Path, **changes) -> tasks.MLMTask:
        return tasks.create_mlm(**data, checkpoint_path=checkpoint_path, training_config=changes)

    return resume_run
