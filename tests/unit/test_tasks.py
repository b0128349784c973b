"The two functions: everything invalid is reported before anything is written."

import contextlib
import logging
import os
import shutil
import sys
from dataclasses import fields
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer, RobertaForMaskedLM, RobertaTokenizer, pipeline

from langmlm.config import ConfigError
from langmlm.data.dataset import check_tokenizer, open_dataset
from langmlm.data.masking import mask_batch
from langmlm.disk import MANIFEST, atomic_folder, hash_json, is_intact, read_json, write_json, write_manifest
from langmlm.model.roberta import ModelConfig
from langmlm.tasks import MLMTask, TokenizerTask, _LaunchedMLMTask, _with_saved_options, create_mlm, create_tokenizer
from langmlm.text.corpus import docstrings
from langmlm.tokens.shards import join_dataset
from langmlm.tokens.tokenizer import VOCABULARY_OPTIONS, TokenizerConfig
from langmlm.train.config import TrainingConfig
from langmlm.train.metrics import History

OPTIONS = {"vocab_size": 500, "min_frequency": 2, "max_length": 32}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 12, "learning_rate": 2e-3}
SETTINGS |= {"logging_steps": 4, "save_steps": 5, "save_total_limit": 1, "bf16": False, "disable_tqdm": True}


@pytest.fixture(scope="module")
def report_and_work(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    "A report, and a folder with text, tokenizer, dataset and two runs: `docs` finished, `stopped` after 6 steps."
    work = tmp_path_factory.mktemp("tasks")
    (work / "data.txt").write_text("\n".join(islice(docstrings(), 150)), encoding="utf-8")
    with contextlib.chdir(work):
        report = create_tokenizer("data.txt", OPTIONS).train()
        for name, stop in (("docs", None), ("stopped", 6)):
            task = create_mlm("tokenizer", "tokenized_dataset", SMALL, {**SETTINGS, "run_name": name})
            task.train(stop_at_step=stop)
    return report, work


@pytest.fixture
def report(report_and_work: tuple[dict, Path]) -> dict:
    "What was found in the text."
    return report_and_work[0]


@pytest.fixture
def work(report_and_work: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    "The folder, as the working directory; tests leave it as it is."
    monkeypatch.chdir(report_and_work[1])
    return report_and_work[1]


# Tokenizer and dataset


def test_tokenizer_of_other_libraries(work: Path):
    "The folder is one that stock `transformers` loads, fast or slow, and that fits the dataset."
    assert len(AutoTokenizer.from_pretrained("tokenizer")) == 500
    check_tokenizer(open_dataset("tokenized_dataset"), RobertaTokenizer.from_pretrained("tokenizer"))
    task = create_tokenizer("data.txt", OPTIONS)
    assert isinstance(task, TokenizerTask) and task.config.vocab_size == 500 and task.tokenizer is None


def test_finished_work_is_reused(work: Path, report: dict):
    "The same call again changes no file and gives the same report."
    stamps = [Path(folder, MANIFEST).stat().st_mtime_ns for folder in ("tokenizer", "tokenized_dataset")]
    assert dict(create_tokenizer("data.txt", OPTIONS).train()) == dict(report)
    assert [Path(folder, MANIFEST).stat().st_mtime_ns for folder in ("tokenizer", "tokenized_dataset")] == stamps


def test_a_tokenizer_of_a_long_model(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "Sequences are cut at the default length, and a warning says so; it is not said of a tokenizer without limit."
    for limit, messages in (
        (8_192, [f"max_length=512 is the default; '{tmp_path}' allows sequences of 8,192 tokens"]),
        (512, []),
        (10**30, []),
    ):
        loaded = AutoTokenizer.from_pretrained("tokenizer")
        loaded.model_max_length = limit
        loaded.save_pretrained(tmp_path)
        caplog.clear()
        assert create_tokenizer("data.txt", {}, tokenizer=str(tmp_path)).config.max_length == 512
        assert caplog.messages == messages
    create_tokenizer("data.txt", {"max_length": 512}, tokenizer=str(tmp_path))
    assert not caplog.messages
    loaded.model_max_length = 128
    loaded.save_pretrained(tmp_path)
    create_tokenizer("data.txt", {"max_length": 512}, tokenizer=str(tmp_path))
    assert caplog.messages == [f"max_length=512 is given; '{tmp_path}' allows sequences of 128 tokens"]


def test_given_tokenizer(work: Path, report: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "It is used as it is, and decides `max_length`; options that have no effect then are named in a warning."
    caplog.set_level(logging.WARNING, "langmlm")
    options = {"path_to_save_dataset": tmp_path / "second", "vocab_size": 300, "lowercase": True}
    again = create_tokenizer("data.txt", options, tokenizer="tokenizer").train()
    assert (again["content"], again["max_length"]) == (report["content"], 32)
    assert caplog.messages == [
        "tokenizer='tokenizer' is used as it is, so these options have no effect: vocab_size, lowercase"
    ]
    assert create_tokenizer("data.txt", {}, tokenizer="tokenizer").config.max_length == 32
    assert create_tokenizer("data.txt", {"max_length": 24}, tokenizer="tokenizer").config.max_length == 24
    assert create_tokenizer("data.txt", TokenizerConfig(max_length=20), tokenizer="tokenizer").config.max_length == 20
    caplog.clear()
    same = create_tokenizer("data.txt", TokenizerConfig(lowercase=True, vocab_size=300), tokenizer="tokenizer")
    assert same.config.max_length == 32 and caplog.messages == [
        "tokenizer='tokenizer' is used as it is, so these options have no effect: vocab_size, lowercase"
    ]
    assert set(VOCABULARY_OPTIONS) <= {entry.name for entry in fields(TokenizerConfig)}


def test_a_dataset_in_parts(work: Path, report: dict, tmp_path: Path):
    "Parts that are tokenized one by one are the whole."
    for number in range(2):
        part = {"shard": (number, 2), "path_to_save_dataset": tmp_path / "shared"}
        create_tokenizer("data.txt", part, tokenizer="tokenizer").train()
    joined = join_dataset([tmp_path / "shared.part-0-of-2", tmp_path / "shared.part-1-of-2"], tmp_path / "shared")
    assert joined["content"] == report["content"]


def test_the_folder_of_a_part_is_checked(work: Path, tmp_path: Path):
    "Before the text is read: the folder of the part must be free, not that of the whole dataset."
    part = {"shard": (0, 2), "path_to_save_dataset": tmp_path / "shared"}
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "notes.txt").touch()
    create_tokenizer("data.txt", part, tokenizer="tokenizer").train()
    (tmp_path / "shared.part-0-of-2" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="shared.part-0-of-2.*notes.txt"):
        create_tokenizer("data.txt", part, tokenizer="tokenizer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_path": "no.txt"}, "no.txt"),
        ({"tokenizer_config": {"vocabsize": 3}}, "'vocabsize' is not an option; did you mean 'vocab_size'?"),
        ({"tokenizer_config": "roberta-base"}, "tokenizer_config is invalid:\n- it must be a dict, got 'roberta-base'"),
        ({"tokenizer": "nowhere"}, "neither a tokenizer folder"),
        ({"tokenizer": "docs"}, "is the folder of a run: name its model, 'docs/final_model'"),
        (
            {"tokenizer_config": {"path_to_save_tokenizer": "."}},
            "path_to_save_dataset='./tokenized_dataset' is inside path_to_save_tokenizer='.': name another folder",
        ),
        ({"tokenizer_config": {"path_to_save_tokenizer": "docs"}}, "contains files that are not part of a tokenizer"),
        ({"tokenizer_config": {"path_to_save_dataset": "docs"}}, "contains files that are not part of a dataset"),
        (
            {"tokenizer_config": {"path_to_save_dataset": "tokenizer"}},
            "must not be the same folder as path_to_save_tokenizer",
        ),
        ({"tokenizer_config": {"path_to_save_tokenizer": "data.txt"}}, "path_to_save_tokenizer='data.txt' is a file"),
        ({"tokenizer_config": {"vocab_size": 0, "max_length": "long"}}, "max_length must be int, got 'long'"),
    ],
)
def test_tokenizer_errors(work: Path, arguments: dict, message: str):
    "Before anything is read or written."
    before = sorted(work.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        create_tokenizer(**{"data_path": "data.txt", **arguments})
    assert message in str(caught.value) and sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("data_path", "config", "tokenizer", "message"),
    [
        (
            "data.txt",
            {"path_to_save_dataset": "tokenizer/dataset"},
            None,
            "is inside path_to_save_tokenizer='./tokenizer'",
        ),
        ("data.txt", {"path_to_save_tokenizer": "tokenized_dataset/tk"}, None, "contains path_to_save_tokenizer"),
        (
            "data.txt",
            {"path_to_save_dataset": "link"},
            None,
            "path_to_save_dataset='link' is the same folder as path_to_",
        ),
        (".", {}, None, "path_to_save_dataset='./tokenized_dataset' is inside data_path='.'"),
        (["data.txt", "tokenizer/vocab.json"], {}, None, "contains data_path='tokenizer/vocab.json'"),
        ("t*/merges.txt", {}, None, "contains data_path='tokenizer/merges.txt'"),
        ("tokenizer", {}, None, "is the same folder as data_path='tokenizer'"),
        ("data.txt", {}, "tokenized_dataset", "is the same folder as tokenizer='tokenized_dataset'"),
        ("data.txt", {"path_to_save_dataset": "tokenizer/x"}, "tokenizer", "is inside tokenizer='tokenizer'"),
        ("data.txt", {"path_to_save_tokenizer": "docs/final_model"}, None, "not part of a tokenizer"),
        ("data.txt", {"path_to_save_dataset": "docs/checkpoint-12"}, None, "not part of a dataset"),
    ],
)
def test_paths_of_a_corpus(work: Path, data_path: object, config: dict, tokenizer: str | None, message: str):
    "Text, tokenizer and dataset must not contain each other, in any direction; models are never replaced."
    Path("link").exists() or Path("link").symlink_to("tokenizer")
    before = sorted(work.rglob("*"))
    with pytest.raises((ConfigError, FileExistsError)) as caught:
        create_tokenizer(data_path, config, tokenizer=tokenizer)
    assert message in str(caught.value) and sorted(work.rglob("*")) == before


def test_the_source_is_not_the_target(work: Path, tmp_path: Path):
    "A dataset of texts is never replaced by its own ids, whether it is given by name or open."
    texts = DatasetDict(train=Dataset.from_dict({"text": ["some text", "more text"]}))
    texts.save_to_disk(tmp_path / "texts")
    (tmp_path / "texts" / "inner").mkdir()
    for source in (str(tmp_path / "texts"), tmp_path / "texts", load_from_disk(str(tmp_path / "texts"))):
        for target in (tmp_path / "texts", tmp_path):
            with pytest.raises(
                ConfigError, match="path_to_save_dataset=.* (is the same folder as|contains) data_path="
            ):
                create_tokenizer(source, {**OPTIONS, "path_to_save_dataset": target})
    assert load_from_disk(str(tmp_path / "texts"))["train"][0] == {"text": "some text"}


def test_home_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "`~` is expanded in every option that is a path."
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy("data.txt", tmp_path / "data.txt")
    paths = {"path_to_save_tokenizer": "~/tk", "path_to_save_dataset": Path("~/ds")}
    create_tokenizer("~/data.txt", {**OPTIONS, **paths}).train()
    settings = {**SETTINGS, "max_steps": 2, "output_dir": "~/run", "logging_dir": "~/logs"}
    create_mlm("~/tk", Path("~/ds"), SMALL, settings).train(stop_at_step=1)
    resumed = create_mlm("~/tk", "~/ds", checkpoint_path="~/run")
    assert (resumed.state.step, resumed.config.run_folder) == (1, tmp_path / "run")
    assert resumed.config.logging_dir == str(tmp_path / "logs")
    part = {"shard": (0, 1), "path_to_save_dataset": "~/part"}
    create_tokenizer("~/data.txt", part, tokenizer="~/tk").train()
    join_dataset(["~/part.part-0-of-1"], "~/joined")
    with pytest.raises(ValueError, match="is inside folders="):
        join_dataset(["~/part.part-0-of-1"], "~/part.part-0-of-1/joined")
    assert not Path("~").exists() and {"tk", "ds", "run", "joined"} < {path.name for path in tmp_path.iterdir()}


def test_what_a_killed_job_left(work: Path, tmp_path: Path):
    "The next job deletes it and restores what was about to be replaced, unless its owner is alive."
    paths = {"path_to_save_tokenizer": tmp_path / "tk", "path_to_save_dataset": tmp_path / "ds"}
    task = create_tokenizer("data.txt", OPTIONS | paths)
    task.train()
    for name in (".tk.0a1b2c3d.partial", ".ds.0a1b2c3d.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "ds").rename(tmp_path / ".ds.0a1b2c3d.replaced")
    (tmp_path / ".mine.0a1b2c3d.partial").touch()
    report = task.train()
    (tmp_path / ".mine.0a1b2c3d.partial").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "tk"] and is_intact(tmp_path / "ds")
    with atomic_folder(tmp_path / "tk") as partial:  # Another writer
        assert task.train() == report and partial.exists()
        write_manifest(partial, "tokenizer")


def test_text_that_is_not_utf_8(work: Path, tmp_path: Path):
    "The error names file, line and byte, and no dataset is written."
    content = (work / "data.txt").read_bytes()
    line = content.count(b"\n") + 2
    (tmp_path / "broken.txt").write_bytes(content + b"\ncaf\xe9")
    paths = {"path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    with pytest.raises(ValueError, match=rf"broken.txt.*\b{line}\b.*is not UTF-8"):
        create_tokenizer(tmp_path / "broken.txt", OPTIONS | paths).train()
    assert not (tmp_path / "dataset").exists()


# Models


def test_finished_run(work: Path):
    "The last checkpoint, the final model and the log; the model loads elsewhere, and fills masks."
    assert sorted(path.name for path in (work / "docs").glob("[!.]*")) == [
        "checkpoint-12",
        "final_model",
        "log.jsonl",
        "trainer_state.json",
    ]
    model = RobertaForMaskedLM.from_pretrained("docs/final_model")
    assert model.config.vocab_size == 500 and model.config.max_position_embeddings == 34
    predictions = pipeline("fill-mask", model="docs/final_model")("Return the <mask> of the file.")
    assert len(predictions) == 5 and all(0 < prediction["score"] < 1 for prediction in predictions)


def test_a_new_run(work: Path, tmp_path: Path):
    "Sizes that the tokenizer and the dataset decide may be given, if they fit."
    sizes = {"vocab_size": 512, "max_position_embeddings": 66}
    task = create_mlm("tokenizer", "tokenized_dataset", SMALL | sizes, {**SETTINGS, "output_dir": tmp_path / "run"})
    assert isinstance(task, MLMTask) and task.model.config.max_position_embeddings == 66
    assert (task.model.config.vocab_size, len(task.tokenizer)) == (512, 500)
    assert task.arithmetic().steps == 12 == task.estimate(steps=1).steps_left
    assert not (tmp_path / "run").exists()
    history = task.train()
    assert isinstance(history, History) and [entry["step"] for entry in history.log_history] == [4, 8, 12]
    assert repr(task) == f"MLMTask({str(tmp_path / 'run')!r}, step 12 of 12: {task.arithmetic().size()})"


def test_a_config_may_be_given(work: Path, tmp_path: Path):
    "Dataclasses instead of dicts."
    settings = TrainingConfig(**{**SETTINGS, "output_dir": tmp_path / "run"})
    task = create_mlm("tokenizer", "tokenized_dataset", ModelConfig(**SMALL), settings)
    assert task.config is settings and task.model.config.hidden_size == 32


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPU cores")
def test_a_run_in_other_processes(work: Path, tmp_path: Path):
    "It has `train` only, and says so."
    settings = {**SETTINGS, "output_dir": tmp_path / "run", "n_gpus": 2, "use_cpu": True}
    task = create_mlm("tokenizer", "tokenized_dataset", SMALL, settings)
    with pytest.raises(AttributeError, match="has no arithmetic: leave n_gpus out to use that"):
        task.arithmetic()
    with pytest.raises(ValueError, match="^stop_at_step must be an integer of at least 1, got 0"):
        task.train(stop_at_step=0)
    (tmp_path / "run" / "final_model").mkdir(parents=True)  # With save_strategy="no", a second call cannot resume
    with pytest.raises(FileExistsError, match="holds another run"):
        task.train()


def test_resumed_run_keeps_its_options(work: Path):
    "And its folder, except for what is given now."
    resumed = create_mlm(
        "tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config={"learning_rate": 1e-3}
    )
    assert (resumed.state.step, resumed.config.run_folder.name, resumed.config.run_folder.resolve()) == (
        6,
        "stopped",
        work / "stopped",
    )
    assert (resumed.config.learning_rate, resumed.config.save_steps, resumed.config.max_steps) == (1e-3, 5, 12)
    renamed = create_mlm(
        "tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config={"run_name": "elsewhere"}
    )
    assert (renamed.state.step, renamed.config.run_folder) == (6, Path("elsewhere"))
    moved = create_mlm(
        "tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config={"output_dir": "moved"}
    )
    assert moved.config.run_folder == Path("moved") and not Path("moved").exists()
    same = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config={"output_dir": None})
    assert same.config.run_folder.resolve() == work / "stopped"


def test_what_was_decided_when_the_run_began(work: Path, caplog: pytest.LogCaptureFixture):
    "A recipe and a budget change nothing when a run is resumed, and that is said; steps can be changed."
    config = {"recipe": "efficient", "budget_minutes": 1, "max_steps": 20}
    resumed = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config=config)
    assert (resumed.config.recipe, resumed.config.budget_minutes, resumed.config.max_steps) == (None, None, 20)
    message = "decided when the run began, and now without effect: recipe=efficient, budget_minutes=1"
    assert message in caplog.messages
    caplog.clear()
    create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config={"recipe": None})
    assert not [text for text in caplog.messages if "when the run began" in text]


def test_stop_at_step(work: Path, caplog: pytest.LogCaptureFixture):
    "It is a step; one that is done already is no error, since a script may be run again."
    resumed = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="stopped")
    for value in (0, -5, "2", 1.5):
        with pytest.raises(ValueError, match=f"stop_at_step must be an integer of at least 1, got {value!r}"):
            resumed.train(stop_at_step=value)
    resumed.train(stop_at_step=5)
    assert resumed.state.step == 6 and "stop_at_step=5: the run is already at step 6" in caplog.messages


def test_a_stopped_run_without_checkpoints_is_finished_once(work: Path, caplog: pytest.LogCaptureFixture):
    "The checkpoint of the stop is not the latest one for ever: it would be resumed again and again."
    settings = {**SETTINGS, "save_strategy": "no", "run_name": "once"}
    create_mlm("tokenizer", "tokenized_dataset", SMALL, settings).train(stop_at_step=2)
    task = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="once")
    task.train()
    again = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="once")
    assert again.state.step == task.state.step == task.loader.plan.total_steps > 2
    again.train()
    assert not list(Path("once").glob("superseded-*")) and (Path("once") / "final_model").is_dir()


def test_objects_are_no_paths(work: Path):
    "A tokenizer or a dataset that is loaded: the error says to save it."
    tokenizer, dataset = AutoTokenizer.from_pretrained("tokenizer"), load_from_disk("tokenized_dataset")
    calls = {
        "tokenizer must be a folder or a name on the Hub, got an object of RobertaTokenizer: save it": [
            lambda: create_mlm(tokenizer, "tokenized_dataset", SMALL),
            lambda: create_tokenizer("data.txt", OPTIONS, tokenizer),
        ],
        "tokenized_dataset must be .* DatasetDict: .* `save_to_disk`": [lambda: create_mlm("tokenizer", dataset, SMALL)],
    }
    for message, attempts in calls.items():
        for attempt in attempts:
            with pytest.raises(ValueError, match=message):
                attempt()


def test_resumed_run_that_was_moved(work: Path, tmp_path: Path):
    "It continues where it is now, not where it was."
    shutil.copytree("stopped", tmp_path / "copy")
    resumed = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path=tmp_path / "copy")
    assert resumed.config.run_folder == tmp_path / "copy" and resumed.state.step == 6


def test_started_from_a_model(work: Path):
    "A new run with the weights of a finished one, or of a checkpoint."
    for path, resume in (("docs/final_model", "auto"), ("docs/checkpoint-12", "weights"), ("docs", "weights")):
        further = create_mlm(
            "tokenizer",
            "tokenized_dataset",
            None,
            {**SETTINGS, "run_name": "further"},
            checkpoint_path=path,
            resume=resume,
        )
        assert (further.state.step, further.config.run_folder.name) == (0, "further")
        expected = RobertaForMaskedLM.from_pretrained("docs/final_model").state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in further.model.state_dict().items())
        assert not further.optimizer.state and Path(further.state.initial_weights).is_dir()
    matching = create_mlm(
        "tokenizer", "tokenized_dataset", SMALL, {"run_name": "more"}, checkpoint_path="docs/final_model"
    )
    assert matching.model.config.num_hidden_layers == 2
    one = {"hidden_size": 32}  # No multiple of the twelve heads that a new model would have
    assert create_mlm("tokenizer", "tokenized_dataset", one, {"run_name": "more"}, checkpoint_path="docs/final_model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": None}, "needs a model_config (for a new model) or a checkpoint_path (for an existing one)"),
        ({"model_config": {**SMALL, "vocab_size": 300}}, "vocab_size=300 is too small: the tokenizer has 500"),
        ({"model_config": {**SMALL, "max_position_embeddings": 32}}, "max_position_embeddings=32 is too small"),
        ({"model_config": {**SMALL, "num_attention_heads": 3}}, "num_attention_heads"),
        ({"training_config": {**SETTINGS, "run_name": "docs"}}, "holds another run"),
        ({"training_config": {**SETTINGS, "output_dir": "data.txt"}}, "output_dir='data.txt' is a file"),
        ({"training_config": {**SETTINGS, "eval_steps": 5}}, "no split 'validation'"),
        ({"training_config": "fast"}, "training_config is invalid:\n- it must be a dict, got 'fast'"),
        ({"mask": None}, "mask must be a function that masks a batch, got None"),
        ({"mask": len}, "it is called with a FlatBatch, the epoch and MaskingRules (too many positional arguments)"),
        ({"tokenized_dataset": "tokenizer"}, "not a dataset folder"),
        ({"tokenized_dataset": "nowhere"}, "nowhere"),
        ({"tokenizer": "tokenized_dataset"}, "is the folder of a dataset: name that of a tokenizer"),
        ({"tokenizer": "docs"}, "is the folder of a run: name its model, 'docs/final_model'"),
        ({"checkpoint_path": "elsewhere"}, "neither a model folder"),
        ({"checkpoint_path": "tokenized_dataset"}, "contains neither a checkpoint nor a model"),
        ({"checkpoint_path": "docs/final_model", "resume": "full"}, "cannot be resumed"),
        ({"training_config": {**SETTINGS, "output_dir": "tokenizer"}}, "is the same folder as tokenizer='tokenizer'"),
        ({"training_config": {**SETTINGS, "output_dir": "tokenizer/run"}}, "is inside tokenizer='tokenizer'"),
        ({"training_config": {**SETTINGS, "output_dir": "tokenized_dataset/run"}}, "is inside tokenized_dataset="),
        ({"training_config": {**SETTINGS, "output_dir": "."}}, "output_dir='.' contains tokenizer='tokenizer'"),
        (
            {"training_config": {**SETTINGS, "report_to": "tensorboard", "logging_dir": "tokenized_dataset/logs"}},
            "logging_dir='tokenized_dataset/logs' is inside tokenized_dataset=",
        ),
        (
            {"training_config": {**SETTINGS, "report_to": "tensorboard", "logging_dir": "data.txt"}},
            "logging_dir must be a folder, got the file 'data.txt'",
        ),
        (
            {
                "checkpoint_path": "docs/final_model",
                "training_config": {**SETTINGS, "output_dir": "docs/final_model/run"},
            },
            "is inside checkpoint_path='docs/final_model'",
        ),
        (
            {"checkpoint_path": "stopped", "model_config": None, "tokenized_dataset": "stopped/checkpoint-5"},
            "output_dir='stopped' contains tokenized_dataset='stopped/checkpoint-5'",
        ),
        ({"resume": "full"}, "needs a checkpoint_path to resume from"),
        ({"resume": "maybe"}, "resume must be 'auto', 'full' or 'weights', got 'maybe'"),
        (
            {"checkpoint_path": "stopped", "model_config": None, "training_config": {"per_device_train_batch_size": 4}},
            "per_device_train_batch_size: then 8, now 4",
        ),
        (
            {"checkpoint_path": "stopped", "model_config": None, "training_config": {"run_name": "docs"}},
            "holds another run",
        ),
        (
            {"checkpoint_path": "docs/final_model", "model_config": {"num_hidden_layers": 3}},
            "model_config has num_hidden_layers=3, but the model has 2: leave model_config out",
        ),
        (
            {"checkpoint_path": "docs/final_model", "model_config": ModelConfig(num_hidden_layers=12)},
            "model_config has num_hidden_layers=12, but the model has 2",
        ),
    ],
)
def test_model_errors(work: Path, changes: dict, message: str):
    "The error names the option, the value and the remedy, and nothing is written."
    arguments = {"tokenizer": "tokenizer", "tokenized_dataset": "tokenized_dataset", "model_config": SMALL}
    before = sorted(work.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        create_mlm(**{**arguments, "training_config": SETTINGS, **changes})
    assert message in str(caught.value) and sorted(work.rglob("*")) == before


def test_folder_of_trackers_that_cannot_be_written(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "It is an error before the run, not at its first step."
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *mode, **options: "locked" not in str(path) and access(path, *mode, **options))
    config = {**SETTINGS, "report_to": "tensorboard", "logging_dir": tmp_path / "locked" / "logs", "run_name": "new"}
    with pytest.raises(PermissionError, match="logging_dir='.*locked/logs' cannot be written to"):
        create_mlm("tokenizer", "tokenized_dataset", SMALL, config)


def forged(folder: Path, **facts) -> None:
    "Change facts in the manifest of a dataset, with a digest that is right."
    manifest = {**read_json(folder / MANIFEST), **facts}
    del manifest["digest"]
    write_json(folder / MANIFEST, manifest | {"digest": hash_json(manifest)})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"max_length": 10**12}, "is damaged: max_length is 1,000,000,000,000"),
        ({"max_length": -1}, "is damaged: max_length is -1"),
        ({"max_length": "64"}, "has no valid max_length"),
        ({"max_length": 10**5000}, "is damaged"),
        ({"content": None, "tokenizer": 3}, "has no valid content; manifest.json has no valid tokenizer"),
        ({"kind": "dataset part"}, "its manifest.json is that of a dataset part: join all parts with join_dataset"),
        ({"files": {"../../secret": {"bytes": 1, "xxh3": "5f3a"}}}, "names files outside the folder: ../../secret"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3": "5f3a"}}}, "names files outside the folder: /etc/passwd"),
        (
            {"files": {"train/state.json": {"bytes": 10**18, "xxh3": "5f3a"}}},
            "bytes instead of 1,000,000,000,000,000,000",
        ),
        ({"files": [[[]]]}, "is damaged"),
        *(
            ({"splits": {"train": {"token_counts": counts}}}, "manifest.json has no valid token_counts")
            for counts in ("1 2", "", [1], "many", "9" * 5_000, "-1 3", "1  2", "\u0661")
        ),
    ],
)
def test_hostile_datasets(work: Path, tmp_path: Path, facts: dict, message: str):
    "A dataset from elsewhere gets a clear error, whatever its manifest says."
    shutil.copytree("tokenized_dataset", tmp_path / "dataset")
    sys.set_int_max_str_digits(10_000)
    try:
        forged(tmp_path / "dataset", **facts)
    finally:
        sys.set_int_max_str_digits(4_300)
    with pytest.raises(ValueError) as caught:
        create_mlm("tokenizer", tmp_path / "dataset", SMALL, {**SETTINGS, "output_dir": tmp_path / "run"})
    assert message in str(caught.value)


def test_links_in_datasets_and_checkpoints(work: Path, tmp_path: Path):
    "Links that lead out of the folder are not followed; a damaged dataset is noticed before training."
    shutil.copytree("tokenized_dataset", tmp_path / "dataset")
    shutil.copytree("docs/checkpoint-12", tmp_path / "run" / "checkpoint-12")
    arguments = {"tokenizer": "tokenizer", "tokenized_dataset": "tokenized_dataset", "model_config": None}
    for name, file, other in (
        ("tokenized_dataset", "dataset/train/data-00000-of-00001.arrow", {"model_config": SMALL}),
        ("checkpoint_path", "run/checkpoint-12/model.safetensors", {}),
    ):
        (tmp_path / file).rename(tmp_path / "secret")
        (tmp_path / file).symlink_to(tmp_path / "secret")
        path = tmp_path / "/".join(file.split("/")[: 1 + (name == "checkpoint_path")])
        with pytest.raises(ValueError, match="is a symbolic link that leads out of the folder"):
            create_mlm(**arguments | other | {name: path})
    (tmp_path / "dataset" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="is damaged: train/data-00000-of-00001.arrow is missing"):
        create_mlm(**arguments | {"model_config": SMALL, "tokenized_dataset": tmp_path / "dataset"})


def test_errors_of_both_configs(work: Path):
    "In one message, each with the name of its config."
    given = {**SMALL, "hidden_sizes": 64}, {**SETTINGS, "warmup_ratio": 2.0, "learning_rates": 1e-4}
    with pytest.raises(ConfigError) as caught:
        create_mlm("tokenizer", "tokenized_dataset", *given)
    assert len(caught.value.errors) == 3
    for message in (
        "model_config: 'hidden_sizes' is not an option",
        "training_config: warmup_ratio must be",
        "training_config: 'learning_rates' is not",
    ):
        assert message in str(caught.value)


def test_other_data(work: Path, tmp_path: Path):
    "A tokenizer and a dataset that do not belong together, and a model for another tokenizer, are errors."
    paths = {"path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    create_tokenizer("data.txt", {**OPTIONS, "vocab_size": 600, **paths}).train()
    with pytest.raises(ValueError, match="tokenizer"):
        create_mlm("tokenizer", tmp_path / "dataset", SMALL, {**SETTINGS, "output_dir": tmp_path / "run"})
    with pytest.raises(ConfigError, match="vocab_size=500 is too small: the tokenizer has 600"):
        create_mlm(
            tmp_path / "tokenizer",
            tmp_path / "dataset",
            None,
            {**SETTINGS, "output_dir": tmp_path / "run"},
            checkpoint_path="docs/final_model",
        )


def test_advice(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A run begins with a line about its size, and a warning if it has few steps."
    caplog.set_level(logging.INFO, "langmlm")
    create_mlm(
        "tokenizer", "tokenized_dataset", SMALL, {**SETTINGS, "output_dir": tmp_path / "run", "max_steps": 1}
    ).train()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "langmlm.tasks"]
    assert [level for level, _ in lines] == ["INFO", "WARNING"] and "raise max_steps" in lines[1][1]


@pytest.mark.parametrize("given", [{"num_train_epochs": 3}, {"num_train_epochs": 3, "max_steps": 9}, {"warmup_ratio": 0.5}])
def test_what_is_given_wins_over_what_was_planned(work: Path, given: dict):
    "Saved `max_steps` and `warmup_steps` would otherwise win over epochs and a ratio that are given now."
    for kind in (dict, TrainingConfig):
        resumed = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path="stopped", training_config=kind(**given))
        plan, config = resumed.loader.plan, resumed.config
        assert config.learning_rate == SETTINGS["learning_rate"] and config.save_steps == 5  # Not given: as saved
        if "max_steps" in given or "warmup_ratio" in given:
            assert plan.total_steps == given.get("max_steps", 12)
        else:
            assert plan.total_steps == 3 * plan.steps_per_epoch and config.max_steps == -1
    start = SimpleNamespace(trainer_state={"langmlm": {"config": {"warmup_steps": 7, "warmup_ratio": 0.1}}}, weights="r/checkpoint-3")
    assert _with_saved_options({"warmup_ratio": 0.2}, start)["warmup_steps"] == 0
    assert _with_saved_options({"warmup_ratio": 0.1}, start)["warmup_steps"] == 7
    start.trainer_state["langmlm"]["config"] |= {"num_train_epochs": 2, "max_steps": 6}
    assert _with_saved_options({"num_train_epochs": 2}, start)["max_steps"] == -1  # Also if the number is the same
    assert _with_saved_options({"num_train_epochs": 2, "budget_minutes": 1}, start)["max_steps"] == 6


@pytest.mark.parametrize("planned", [{"recipe": "efficient"}, {"budget_minutes": 0.02}, {"per_device_train_batch_size": "auto"}])
def test_a_planned_run_is_resumed_with_its_config(work: Path, tmp_path: Path, planned: dict):
    "As an object, too: nothing is planned again."
    config = TrainingConfig(output_dir=tmp_path / "run", bf16=False, use_cpu=True, **{"max_steps": 4} if "budget_minutes" not in planned else {}, **planned)
    task = create_mlm("tokenizer", "tokenized_dataset", SMALL, config)
    task.train(stop_at_step=1)
    resumed = create_mlm("tokenizer", "tokenized_dataset", checkpoint_path=tmp_path / "run", training_config=config)
    assert resumed.state.step == 1 and resumed.loader.plan.total_steps == task.loader.plan.total_steps
    assert resumed.config.per_device_train_batch_size == task.config.per_device_train_batch_size


def test_options_of_earlier_sessions():
    "What the script of a resumed run says decides, and else what was given when it began."
    saved = {"gradient_accumulation_steps": 2, "max_steps": 102, "eval_steps": 5, "probe_sentences": ["a <mask>"]}
    start = SimpleNamespace(trainer_state={"langmlm": {"config": saved, "given_accumulation": 4}}, weights="run/checkpoint-3")
    assert _with_saved_options(None, start)["gradient_accumulation_steps"] == 4
    assert _with_saved_options({"gradient_accumulation_steps": 1}, start)["gradient_accumulation_steps"] == 1
    assert _with_saved_options({"budget_minutes": 1, "max_steps": -1}, start)["max_steps"] == 102  # The plan stays
    assert _with_saved_options({"max_steps": -1}, start)["max_steps"] == -1
    assert _with_saved_options({"eval_steps": None}, start)["probe_sentences"] == ()
    assert _with_saved_options({"eval_steps": 3}, start)["probe_sentences"] == ["a <mask>"]


def test_an_interrupted_launch_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "After Ctrl-C, another call of `train` resumes what the processes have saved; a folder of another run is left alone."
    calls = []

    def launch(function, args: tuple, number: int) -> None:
        calls.append(args[0]["checkpoint_path"])
        if len(calls) < 3:
            (tmp_path / "run" / f"checkpoint-{len(calls)}").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("langmlm.tasks.launch_processes", launch)
    config = TrainingConfig(n_gpus=2, output_dir=tmp_path / "run")
    arguments = {"mask": mask_batch, "checkpoint_path": None, "model_config": {}, "resume": "auto"}
    task, other = _LaunchedMLMTask(config, arguments), _LaunchedMLMTask(config, dict(arguments))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            task.train()
    with pytest.raises(KeyboardInterrupt):  # Nothing of its own was saved
        other.train()
    with pytest.raises(KeyboardInterrupt):
        other.train()
    assert calls == [None, str(tmp_path / "run"), None, None]


def test_earlier_checkpoints_keep_full_batches():
    "A checkpoint without `fill_batches` resumes with the batches that it was trained with; a new one with its own."
    for saved, expected in (({}, True), ({"fill_batches": False}, False)):
        start = SimpleNamespace(trainer_state={"langmlm": {"config": saved}}, weights="run/checkpoint-3")
        assert _with_saved_options(None, start)["fill_batches"] is expected


def test_model_with_another_tokenizer(work: Path, tmp_path: Path):
    "A model is not continued with the ids of another tokenizer; without a tokenizer of its own, nothing is known."
    options = {**OPTIONS, "path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    create_tokenizer("data.txt", options | {"lowercase": True}).train()
    other = {"tokenizer": tmp_path / "tokenizer", "tokenized_dataset": tmp_path / "dataset"}
    saved = read_json(tmp_path / "tokenizer" / "tokenizer_config.json")
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # Which transformers 4 knows, too
    settings = {"training_config": {"output_dir": tmp_path / "run"}}
    with pytest.raises(ConfigError, match=r"its tokenizer has other ids for \d+ of the 500 tokens: tokenize the text with tokenizer='docs/final_model'"):
        create_mlm(**other, **settings, checkpoint_path="docs/final_model")
    RobertaForMaskedLM.from_pretrained("docs/final_model").save_pretrained(tmp_path / "weights")
    create_mlm(**other, **settings, checkpoint_path=tmp_path / "weights")


def test_the_final_tokenizer_truncates(work: Path, tmp_path: Path):
    "`truncation=True` with the tokenizer of `final_model` gives what the model reads, whatever the first tokenizer allowed."
    given = AutoTokenizer.from_pretrained("tokenizer", model_max_length=10**30)
    given.save_pretrained(tmp_path / "given")
    config = {"max_length": 16, "path_to_save_dataset": tmp_path / "dataset"}
    create_tokenizer("data.txt", config, tokenizer=tmp_path / "given").train()
    settings = {**SETTINGS, "max_steps": 1, "output_dir": tmp_path / "run"}
    create_mlm(tmp_path / "given", tmp_path / "dataset", SMALL, settings).train()
    final = tmp_path / "run" / "final_model"
    inputs = AutoTokenizer.from_pretrained(final)("one two three " * 99, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 16)
    assert RobertaForMaskedLM.from_pretrained(final)(**inputs).logits.isfinite().all()
    create_mlm(final, tmp_path / "dataset", checkpoint_path=final, training_config={"output_dir": tmp_path / "next"})


def test_work_is_logged(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "Without a terminal, the log says what is going on, long before the first log entry of a run."
    caplog.set_level("INFO", "langmlm")
    options = {**OPTIONS, "path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    create_tokenizer("data.txt", options).train()
    assert [message for message in caplog.messages if message.startswith(("training the", "tokenized"))] == [
        "training the tokenizer",
        "tokenized 150 documents",
    ]
    for logging_steps, said in ((10**6, 1), (6, 0)):
        caplog.clear()
        settings = {**SETTINGS, "max_steps": 6, "logging_steps": logging_steps, "output_dir": tmp_path / str(said)}
        create_mlm("tokenizer", "tokenized_dataset", SMALL, settings).train()
        assert sum(message.startswith("about ") and ": 1 step of " in message for message in caplog.messages) == said
