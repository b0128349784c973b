"Whatever is passed to the public API either works or is an error of ours, before anything is written."

import copy
import math
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ARCHITECTURE, SETTINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langmlm import tasks
from langmlm.config import ConfigError
from langmlm.model.roberta import ModelConfig
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class NoPath:
    "A path of bytes, which few functions expect."

    def __fspath__(self) -> bytes:
        return b"bytes"


PLAIN = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 500, 1.0, 3.0, 2.5, 0.1, 0.999999, 1e-300, 1e300, -0.0]
HUGE = [2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, -(10**30), 10**5_000, math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "linear", "no", "text", "token", "word", "NFC", "none", "all", "tensorboard", "gelu", "\0", "\ud800", "é", "x" * 300]
PATHS = [".", "..", "/", "~", "data.txt", "dataset", "tokenizer", "tokenizer/sub", "dataset/../tokenizer", "new", "new/a/b", "kept", "link"]
SCALARS = [np.int64(3), np.uint8(200), np.float32(0.5), np.float64(0.1), np.float64("nan"), np.bool_(True), np.str_("new")]
OTHERS = [b"bytes", (), [], {}, set(), (0, 2), [0, 2], (2, 2), (0, 10**30), [None], ["none"], [[]], object, np.arange(3), NoPath()]
OTHERS += [Path("new"), Path("tokenizer") / "sub", ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "é"], 1j, range(3)]
VALUES = [*PLAIN, *HUGE, *TEXTS, *PATHS, *SCALARS, *OTHERS]
ELSEWHERE = ["dataloader_num_workers", "eval_strategy", "vocab_sizes", "", 7, None, ("a",), "run_nam", "\ud800"]


def options(kind: type) -> st.SearchStrategy:
    "One to three options of a config, rarely a key that is none, with any values."
    names = st.one_of(*[st.sampled_from([entry.name for entry in fields(kind)])] * 9, st.sampled_from(ELSEWHERE))
    return st.dictionaries(names, st.sampled_from(VALUES), min_size=1, max_size=3)


@pytest.fixture
def place(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A working directory with text, a tokenizer and a dataset, a folder of the user, and a link to it."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("one two three\n" * 50)
    for name, path in (("tokenizer", data["tokenizer"]), ("dataset", data["tokenized_dataset"])):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def everything(folder: Path) -> dict[str, tuple]:
    "Every file and folder below a folder, with what changes when it is written to."
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            status = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def call(function, place: Path, **arguments) -> object | None:
    "Call a task; return None for an error of ours, after which nothing may have been written."
    before = everything(place)
    try:
        return function(**arguments)
    except ConfigError as error:
        assert error.errors and all(0 < len(message) < 1_000 for message in error.errors)
    except (FileExistsError, ValueError) as error:  # A folder that holds something else, names of files that are none
        names = ("path_to_save", "output_dir", "n_gpus", "eval_steps", "micro-batch", "split 'validation'", "vocab_size")
        assert any(name in str(error) for name in names), error
    finally:
        assert everything(place) == before
    return None


@given(options(TokenizerConfig))
@FUZZ
def test_tokenizer_config(place: Path, given_options: dict):
    "`create_tokenizer` writes nothing, whatever the options are."
    config = copy.copy(given_options)
    if call(tasks.create_tokenizer, place, data_path="data.txt", tokenizer_config=config) is not None:
        assert TokenizerConfig(**given_options)


@given(options(ModelConfig))
@FUZZ
def test_model_config(place: Path, given_options: dict):
    "A model is built, or its config is an error."
    config = {**ARCHITECTURE, **given_options}
    training = {**SETTINGS, "output_dir": "new"}
    arguments = {"tokenizer": "tokenizer", "tokenized_dataset": "dataset", "model_config": config}
    task = call(tasks.create_mlm, place, **arguments, training_config=training)
    assert task is None or task.model.num_parameters() > 0


@given(options(TrainingConfig))
@FUZZ
def test_training_config(place: Path, given_options: dict):
    "A run is ready to train, with the options it was given, or its config is an error."
    config = {**SETTINGS, "output_dir": "new", **given_options}
    arguments = {"tokenizer": "tokenizer", "tokenized_dataset": "dataset", "model_config": ARCHITECTURE}
    task = call(tasks.create_mlm, place, **arguments, training_config=config)
    if task is not None:
        assert isinstance(task, tasks._LaunchedMLMTask) or 0 < task.arithmetic().steps <= 10**9
        for name, value in given_options.items():  # The budget is replaced by steps
            assert getattr(task.config, name) == (None if name == "budget_minutes" else value)


@pytest.mark.parametrize("values", [value for value in (*TEXTS, *OTHERS, 7, math.nan, True) if type(value) is not dict])
def test_configs_of_other_types(place: Path, values):
    "A config that is no dict is an error of ours."
    for function, name in ((tasks.create_tokenizer, "tokenizer_config"), (tasks.create_mlm, "training_config")):
        arguments = {"data_path": "data.txt"} if name == "tokenizer_config" else {"model_config": ARCHITECTURE}
        if name == "training_config":
            arguments |= {"tokenizer": "tokenizer", "tokenized_dataset": "dataset"}
        with pytest.raises(ConfigError, match=f"^{name} is invalid:\n- it must be a dict, got "):
            function(**arguments, **{name: values})
