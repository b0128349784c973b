"The command line: options are the fields of the configs, errors have one line, and the tasks get what was given."

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature
from os import PathLike
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fastcore.docments import docments
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from langmlm import cli, tasks
from langmlm.arguments import _parse_value, collect_arguments, list_options, parse_words, read_options, save_options
from langmlm.config import SPECIAL_TOKENS, ConfigError, ModelConfig, TokenizerConfig
from langmlm.disk import lock_folder
from langmlm.folders import list_checkpoints
from langmlm.testing import tiny_run
from langmlm.train.config import TrainingConfig

SECTIONS = {"tokenizer_config": TokenizerConfig, "model_config": ModelConfig, "training_config": TrainingConfig}
TRAIN = {"tokenizer": "tokenizer", "tokenized_dataset": "tokenized_dataset", "checkpoint_path": None, "resume": "auto"}
TRAIN |= {"model_config": {}, "training_config": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with `tokenizer`, `dataset` and a finished `run`; tests leave it as it is."
    folder = tmp_path_factory.mktemp("cli")
    tiny_run(folder).train()
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    "What `create_tokenizer` and `create_mlm` are called with, in an empty working directory; they do nothing."
    found = []

    def create_mlm(**call) -> SimpleNamespace:
        found.append(call)
        plan, config = SimpleNamespace(total_steps=10), TrainingConfig(output_dir="run")
        task = {"config": config, "loader": SimpleNamespace(plan=plan), "model": SimpleNamespace(config=ModelConfig())}
        task |= {
            "accelerator": SimpleNamespace(is_main_process=True),
            "train": lambda stop: found.append({"stop": stop}),
        }
        paths = {name: call[name] for name in ("tokenizer", "tokenized_dataset")}
        task["run_folder"] = SimpleNamespace(description={"paths": paths})
        return SimpleNamespace(state=SimpleNamespace(step=10, initial_weights=None, initialization="random"), **task)

    def create_tokenizer(*call) -> SimpleNamespace:
        found.append(call)
        return SimpleNamespace(config=TokenizerConfig(shard=call[1].get("shard")), train=lambda: "report")

    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "tokenized_dataset"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tasks, "create_mlm", create_mlm)
    monkeypatch.setattr(tasks, "create_tokenizer", create_tokenizer)
    return found


def fail(words: list[str], capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    "Run a command that fails; return its exit status and the lines on stderr."
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().err.splitlines()


# Values


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("2e-4", float, 2e-4),
        ("1_000", int, 1_000),
        ("3", int | float, 3),
        ("3.0", int | float, 3.0),
        ("3.5", int, "3.5"),
        ("True", bool, True),
        ("false", bool | None, False),
        ("None", bool | None, None),
        ("null", int | None, None),
        ("none", str, "none"),
        ("", int | None, ""),  # An unset variable of the shell is not a default
        ("", str | PathLike | None, ""),
        ("no", str, "no"),
        ("no", bool, "no"),
        ("1", str | None, "1"),
        (["0", "2"], tuple[int, int] | list[int] | None, [0, 2]),
        (["none", "911", "2.5"], list | tuple, ["none", "911", "2.5"]),
        (["none"], list | tuple | str, ["none"]),
        (["1e-3"], Sequence[float], [1e-3]),
        (["0.3"], list | tuple | float | None, [0.3]),
        (["1", "2.5"], list | tuple | float | None, [1.0, 2.5]),
        (["1", "x"], Sequence[int], [1, "x"]),
    ],
)
def test_values(text, annotation, value):
    "The annotation decides what text becomes; what does not fit stays as it is."
    parsed = _parse_value(text, annotation)
    assert (parsed, type(parsed)) == (value, type(value))


@settings(deadline=None)
@given(
    st.sampled_from([TrainingConfig, ModelConfig, TokenizerConfig]),
    st.dictionaries(
        st.sampled_from(["run_name", "output_dir", "text_column"]),
        st.sampled_from(["null", "NULL", "1"])
        | st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]), min_size=1, max_size=30),
    ),
    st.floats(1e-300, 1e300),
    st.sampled_from(["steps", "epoch", "no"]),
)
def test_every_config_survives_a_file(tmp_path_factory, kind, names, rate, strategy):
    "What is written as YAML is read back as the same config, for every type of option."
    known = {entry.name for entry in fields(kind)}
    changes = names | {"learning_rate": rate, "layer_norm_eps": rate, "save_strategy": strategy, "shard": [0, 3]}
    changes = {"run_name": "2024", "report_to": ["none"], "probe_sentences": ["911", "1.5", "null"]} | changes
    options = {name: getattr(kind(), name) for name in known} | {n: v for n, v in changes.items() if n in known}
    options |= {"special_tokens": [*SPECIAL_TOKENS, "911", "~"], "mixing": [0.5]} if kind is TokenizerConfig else {}
    section = next(name for name, config in SECTIONS.items() if config is kind)

    def command(**sections):
        "Take options."

    parameter = signature(cli._train).parameters["model_config"].replace(name=section, annotation=kind)
    command.__signature__ = signature(command).replace(parameters=[parameter])
    assume("none" not in map(str.lower, names.values()))  # YAML writes it without quotes
    assume(not names.get("output_dir", "").startswith("~"))  # Expanded in every path
    file = save_options(tmp_path_factory.mktemp("options"), {section: options})
    assert collect_arguments(command, {"config": file}) == {section: options}


# Options


@pytest.mark.parametrize(
    ("command", "kinds"),
    [("tokenizer", [TokenizerConfig]), ("train", [ModelConfig, TrainingConfig]), ("resume", [TrainingConfig])],
)
def test_help_has_one_line_for_each_field(command: str, kinds: list, capsys: pytest.CaptureFixture):
    "With the comment of the field."
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for kind in kinds:
        comments = docments(kind)
        for entry in fields(kind):
            (line,) = [line for line in lines if line.startswith(f"  --{entry.name} ")]
            assert comments[entry.name] in line


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture):
    "A usage line names what is needed, and every option has a description, not only a default."
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: langmlm {command} ") and usage.endswith(" [OPTIONS]")
    assert usage.count("[") - usage.count("...]") < 3
    assert ("--output PATH" in usage) == (command == "plot") and lines[0] == ""
    options = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.startswith("  --")]
    assert options and all(len(found) == 2 and found[1][0] != "[" for found in options)


def test_resume_shows_no_defaults(capsys: pytest.CaptureFixture):
    "An option that is not given keeps the value of the run, not the default."
    with pytest.raises(SystemExit):
        cli.main(["resume", "--help"])
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --") and line.endswith("]")]


def test_names_of_a_command_are_unique():
    "No option of a command is in two configs."
    assert not {entry.name for entry in fields(ModelConfig)} & {entry.name for entry in fields(TrainingConfig)}
    arguments = {*signature(cli._train).parameters} | {*signature(cli._resume).parameters}
    assert not arguments & {entry.name for kind in SECTIONS.values() for entry in fields(kind)}


def test_help_imports_nothing_slow():
    "The help of all commands."
    program = f"import sys\nfrom langmlm.cli import main\nfor name in {list(cli._COMMANDS)}:\n"
    program += "    try:\n        main([name, '--help'])\n    except SystemExit:\n        pass\n"
    program += "print({'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_help_fits_the_terminal(is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    "Elsewhere an option and its description share a line, for `grep`."
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setattr("os.isatty", lambda descriptor: is_terminal)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert (max(map(len, lines)) <= 72) == is_terminal
    assert any("--save_total_limit" in line and "None: all" in line for line in lines) != is_terminal


def test_train_passes_what_is_given(calls: list):
    "Nothing else, so that a task fills in the defaults."
    assert cli.main(["train"]) == 0
    assert calls == [TRAIN, {"stop": None}]


def test_spellings_of_options(calls: list, capsys: pytest.CaptureFixture):
    "Hyphens, `=`, booleans with and without a value, lists."
    words = "train --hidden-size 64 --learning_rate=1e-3 --bf16 --packing false --report_to tensorboard wandb"
    assert cli.main([*words.split(), "--fp16=False", "--disable_tqdm", "null", "--eval_steps", "none", "--stop-at-step", "5"]) == 0
    options = {"learning_rate": 1e-3, "bf16": True, "packing": False, "report_to": ["tensorboard", "wandb"]}
    options |= {"fp16": False, "disable_tqdm": None, "eval_steps": None}
    assert calls == [TRAIN | {"model_config": {"hidden_size": 64}, "training_config": options}, {"stop": 5}]
    assert capsys.readouterr().out == "run/final_model\n"


def test_a_model_to_start_from_needs_no_architecture(calls: list):
    "`model_config` is empty unless an option of it is given."
    cli.main(["train", "--checkpoint_path", "roberta-base", "--resume", "weights"])
    cli.main(["train", "--checkpoint_path", "roberta-base", "--hidden_size", "768"])
    assert [call["model_config"] for call in calls[::2]] == [{}, {"hidden_size": 768}]


def test_tokenizer_arguments(calls: list, capsys: pytest.CaptureFixture):
    "A boolean before the text does not swallow it; the folders that were written are printed."
    assert cli.main(["tokenizer", "--lowercase", "a.txt", "b.txt", "--shard", "0", "2"]) == 0
    assert "dataset: tokenized_dataset.part-0-of-2\n" in capsys.readouterr().out
    assert cli.main(["tokenizer", "a.txt", "--tokenizer", "old"]) == 0
    assert "dataset: ./tokenized_dataset\n" in capsys.readouterr().out
    assert calls == [(["a.txt", "b.txt"], {"lowercase": True, "shard": [0, 2]}, None), (["a.txt"], {}, "old")]


def test_command_line_wins(calls: list):
    "Over a configuration file, which is one for all commands."
    Path("run.yaml").write_text(
        "data_path: text.txt\ntokenizer_config:\n  path_to_save_tokenizer: t\n  path_to_save_dataset: d\n  vocab_size: 300\n"
        "training_config:\n  learning_rate: 1e-3\n  save_strategy: no\n  max_steps: 5\nmodel_config:\n"
    )
    assert cli.main(["tokenizer", "--config", "run.yaml", "--vocab_size", "400"]) == 0
    assert cli.main(["train", "--config", "run.yaml", "--max_steps", "6"]) == 0
    options = {"path_to_save_tokenizer": "t", "path_to_save_dataset": "d", "vocab_size": 400}
    assert calls[0] == ("text.txt", options, None)
    training = {"learning_rate": 1e-3, "save_strategy": "no", "max_steps": 6}
    assert calls[1] == TRAIN | {"tokenizer": "t", "tokenized_dataset": "d", "training_config": training}


def test_lists_of_one_value(calls: list):
    "A single word may stand for itself; a list of a file is a list, as in Python."
    for words, expected in (
        ("--mixing 0.5", {"mixing": 0.5}),
        ("--mixing none --shard none", {"mixing": None, "shard": None}),
        ("--mixing 0.5 3", {"mixing": [0.5, 3.0]}),
        ("--special_tokens <s> 911", {"special_tokens": ["<s>", "911"]}),
    ):
        assert cli.main(["tokenizer", "text.txt", *words.split()]) == 0
        assert calls.pop() == (["text.txt"], {**expected}, None)
    Path("run.yaml").write_text("tokenizer_config:\n  mixing: [0.5]\n  special_tokens: [<s>, 911]\n")
    assert cli.main(["tokenizer", "text.txt", "--config", "run.yaml"]) == 0
    assert calls.pop()[1] == {"mixing": [0.5], "special_tokens": ["<s>", "911"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("training_config: {run_name: null, eval_steps: ~, output_dir: }", {"run_name": None, "eval_steps": None, "output_dir": None}),
        ("training_config: {run_name: 'null', output_dir: 'none'}", {"run_name": "null", "output_dir": "none"}),
        ("training_config: {max_steps: '5', bf16: \"true\"}", {"max_steps": "5", "bf16": "true"}),
        ("training_config: {run_name: none, eval_steps: none}", {"run_name": "none", "eval_steps": None}),
    ],
)
def test_null_and_quotes_in_a_file(calls: list, content: str, expected: dict):
    "As in YAML: null is None, and text in quotes is text, which the configs report where it does not fit."
    Path("run.yaml").write_text(content)
    assert cli.main(["train", "--config", "run.yaml"]) == 0
    assert calls[0]["training_config"] == expected
    assert all(type(value) in (str, type(None)) for value in calls[0]["training_config"].values())


def test_null_where_a_value_is_needed(calls: list, capsys: pytest.CaptureFixture):
    "An error with the name of the argument."
    Path("run.yaml").write_text("tokenizer: null\ncheckpoint_path: null\nmodel_config: null\n")
    assert fail(["train", "--config", "run.yaml"], capsys) == (2, ["langmlm train: error: tokenizer must not be null"])
    Path("run.yaml").write_text("checkpoint_path: null\nmodel_config: null\n")
    assert cli.main(["train", "--config", "run.yaml"]) == 0 and calls[0] == TRAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "'learning_rate' belongs in training_config"),
        ("vocab_size: 1", "'vocab_size' belongs in tokenizer_config or model_config"),
        ("traning_config: {}", "did you mean 'training_config'?"),
        ("training_config: [1]", "training_config must hold options"),
        ("- 1", "it must have keys"),
        ("a: [", "it is not valid YAML"),
        ("training_config: {run_name: a}\ntraining_config:\n  max_steps: 3", "the key 'training_config' is repeated"),
        ("training_config: {max_steps: 2, max_steps: 3}", "the key 'max_steps' is repeated"),
    ],
)
def test_invalid_files(tmp_path: Path, content: str, message: str):
    "The error names the file and what is wrong."
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_options(tmp_path / "run.yaml")
    assert message in str(error.value) and "run.yaml is invalid" in str(error.value)
    assert all("\n" not in line for line in error.value.errors)


def test_files_of_options_are_never_overwritten(tmp_path: Path):
    "The same options again write no file, others the next one."
    for number in range(12):
        assert save_options(tmp_path / "run", {"training_config": {"max_steps": number}}).exists()
        save_options(tmp_path / "run", {"training_config": {"max_steps": number}})
    saved = list_options(tmp_path / "run")
    assert [yaml.safe_load(file.read_text())["training_config"]["max_steps"] for file in saved] == list(range(12))


def test_resume_takes_the_paths_of_the_run(calls: list):
    "From the latest options in its folder, also for one of its checkpoints; nothing else is taken from there."
    Path("run/checkpoint-5").mkdir(parents=True)
    save_options(Path("run"), {"tokenizer": "first", "tokenized_dataset": "d", "training_config": {"max_steps": 7}})
    save_options(Path("run"), {"tokenizer": "t", "tokenized_dataset": "d", "training_config": {"max_steps": 7}})
    for run in ("run", "run/checkpoint-5"):
        assert cli.main(["resume", run, "--save_steps", "3"]) == 0
        expected = {"tokenizer": "t", "tokenized_dataset": "d", "training_config": {"save_steps": 3}}
        assert calls[-2] == expected | {"checkpoint_path": run, "resume": "full"}
        Path("run/options-3.yaml").unlink()  # Of the session above
    assert cli.main(["resume", "run", "--tokenized_dataset", "moved"]) == 0
    assert (calls[-2]["tokenizer"], calls[-2]["tokenized_dataset"]) == ("t", "moved")


def test_resume_a_run_that_python_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "From its folder or a checkpoint, in any working directory, with the paths that the run has recorded."
    tiny_run(tmp_path / "made", max_steps=20).train(stop_at_step=10)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "made" / "run"
    assert cli.main(["resume", str(run / "checkpoint-10"), "--output_dir", "other", "--stop_at_step", "11"]) == 0
    assert cli.main(["resume", str(run)]) == 0 and (run / "final_model").is_dir()
    saved = yaml.safe_load((run / "options.yaml").read_text())
    assert saved["tokenized_dataset"] == str(tmp_path / "made" / "dataset")


def test_resume_without_the_files_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The paths are those of its newest checkpoint, and not those of another options file in the folder above."
    tiny_run(tmp_path / "made", max_steps=20).train(stop_at_step=10)
    run = tmp_path / "made" / "run"
    (run.parent / "options.yaml").write_text("tokenizer: other\n")
    (run / "trainer_state.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["resume", str(run), "--stop_at_step", "11"]) == 0
    assert (run / "checkpoint-11").is_dir()


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --do_train", "'do_train' is not an option: leave it out, since langmlm train always trains"),
        ("train --train_file data.txt", "is not an option: make the dataset with langmlm tokenizer FILE"),
        ("train --model_name_or_path roberta-base", "is not an option: the name is checkpoint_path"),
        ("resume run --resume_from_checkpoint run", "is not an option: type langmlm resume RUN"),
        ("train --max_seq_length 128", "is not an option: the text is cut by langmlm tokenizer --max_length"),
        ("bench --do_train", "leave it out"),
        ("train --learnin_rate 1", "'learnin_rate' is not an option; did you mean 'learning_rate'?"),
        ("train --hub_always_push", "the final model is uploaded at the end of the run: set push_to_hub"),
        ("tokenizer a.txt --vocabsize=3", "did you mean 'vocab_size'?"),
        ("train text.txt", "unexpected arguments: text.txt"),
        ("tokenizer --data_path a.txt", "'data_path' is given without a name: langmlm tokenizer [DATA ...] [OPTIONS] (see"),
        ("tokenizer --data a.txt", "'data' is given without a name: langmlm tokenizer [DATA ...] [OPTIONS] (see"),
        ("tokenizer a.txt --path there", "'path' is not an option (see"),
        ("train --device cuda", "'device' is not an option: the name is use_cpu"),
        ("train --hidden_size", "--hidden_size: expected one argument"),
        ("train --hidden_size many", "model_config: hidden_size must be int, got 'many'"),
        ("train --stop_at_step soon", "stop_at_step must be an integer, got 'soon'"),
        ("evaluate run data.csv --folds 2.5", "folds must be an integer, got '2.5'"),
        ("evaluate run data.csv --learning_rates 1e-3 high", "learning_rates must be a number, got 'high'"),
        ("tokenizer", "DATA is missing"),
        ("plot run", "--output"),
        ("", "name a command"),
        ("nothing", "invalid choice: 'nothing'"),
        ("--print_completion sh", "invalid choice: 'sh'"),
    ],
)
def test_wrong_usage(words: str, message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch):
    "One line on stderr and status 2, before anything is written."
    monkeypatch.chdir(tmp_path)
    status, lines = fail(words.split(), capsys)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("langmlm") and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_several_invalid_options_have_a_line_each(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    "Of both configs, each named once."
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "tokenized_dataset"):
        (tmp_path / name).mkdir()
    status, lines = fail("train --learning_rate -1 --mlm_probability 2 --hidden_size 0".split(), capsys)
    assert status == 2 and len(lines) == 3
    assert all(re.match(r"langmlm train: error: (model|training)_config: (?!\w+_config)", line) for line in lines)


def test_missing_folders_are_not_searched_for_on_the_hub(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    "A request without a network takes a minute."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert "there is no folder 'tokenizer' here: make it with langmlm tokenizer" in fail(["train"], capsys)[1][-1]


def test_resume_without_the_dataset(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "The error says how to name another folder."
    shutil.copytree(finished / "run", tmp_path / "run")
    status, lines = fail(["resume", str(tmp_path / "run"), "--tokenized_dataset", str(tmp_path / "gone")], capsys)
    assert status == 1 and lines[-1].endswith("or name another one with --tokenized_dataset")
    assert f"there is no folder {str(tmp_path / 'gone')!r}" in lines[-1]


def test_home_folder(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    "The shell replaces `~` neither in quotes nor after an equals sign."
    monkeypatch.setenv("HOME", str(finished))
    assert cli.main(["info", "~/run"]) == 0 and "final_model" in capsys.readouterr().out
    assert collect_arguments(cli._plot, {"runs": ["~/run"], "output": "~/a.png"}) == {
        "runs": [str(finished / "run")],
        "output": str(finished / "a.png"),
    }


def test_resume_a_finished_run(calls: list, caplog: pytest.LogCaptureFixture):
    "Says that there is nothing left to train."
    (Path("run") / "checkpoint-10").mkdir(parents=True)
    assert cli.main(["resume", "run"]) == 0
    assert any("the run has finished" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tokenizer no.txt", "no.txt"),
        ("train", "there is no folder 'tokenizer' here: make it with langmlm tokenizer"),
        ("train --tokenizer t --tokenized_dataset d", "tokenizer='t' is neither a tokenizer folder nor a name on the Hub"),
        ("train --config no.yaml", "no.yaml: No such file or directory"),
        ("resume nowhere", "RUN='nowhere' is not a folder"),
        ("resume .", "contains neither a checkpoint nor a model"),
        ("info nowhere", "PATH='nowhere' is not a folder"),
        ("info .", "is neither a tokenizer nor a dataset, checkpoint, model or run"),
        ("fill-mask nowhere <mask>", "MODEL='nowhere' is neither the folder nor the Hub name"),
        ("plot nowhere --output a.png", "RUN='nowhere' has no log.jsonl"),
        ("plot . --output loss", "output='loss' must end in a format, such as .png"),
        ("export nowhere", "MODEL='nowhere' is not the folder of a run or a model"),
        ("demo .", "FOLDER='.' exists: name a new folder"),
    ],
)
def test_errors(words: str, message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch):
    "One line on stderr, without a traceback, and status 1."
    monkeypatch.chdir(tmp_path)
    status, lines = fail(words.split(), capsys)
    assert status == 1 and message in lines[-1] and lines[-1].startswith(f"langmlm {words.split()[0]}: error: ")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("position", ["before", "after"])
def test_debug_shows_the_traceback(position: str):
    "Before or after the name of the command."
    words = ["--debug", "info", "nowhere"] if position == "before" else ["info", "nowhere", "--debug"]
    with pytest.raises(FileNotFoundError):
        cli.main(words)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (KeyboardInterrupt("stopped after step 3"), 130, []),
        (SystemExit(143), 143, []),
        (
            ConfigError("training_config", ["a", "b"]),
            2,
            ["langmlm train: error: training_config: a", "langmlm train: error: training_config: b"],
        ),
        (ValueError("first\n  second"), 1, ["langmlm train: error: first second"]),
        (ValueError("other:\n- a\n- b"), 1, ["langmlm train: error: other: a; b"]),
        (ConfigError("evaluate", ["a"]), 2, ["langmlm train: error: a"]),
        (FloatingPointError("the loss diverged"), 1, ["langmlm train: error: the loss diverged"]),
        (ImportError("pip install x"), 1, ["langmlm train: error: pip install x"]),
        (KeyError("x"), 1, ["langmlm train: error: KeyError: 'x' (--debug shows the traceback)"]),
        (OSError(28, "No space left on device", "file"), 1, ["langmlm train: error: file: No space left on device"]),
    ],
)
def test_exit_status(error: BaseException, status: int, expected: list[str], capsys, monkeypatch):
    "Of what a task raises."

    def create_mlm(**call):
        raise error

    monkeypatch.setattr(tasks, "create_mlm", create_mlm)
    assert fail(["train", "--tokenizer", "t", "--tokenized_dataset", "d"], capsys) == (status, expected)


def test_a_stopped_run_says_how_to_resume(calls: list, monkeypatch, caplog: pytest.LogCaptureFixture):
    "With the command to type, if there is a checkpoint to resume."
    create_mlm = tasks.create_mlm

    def interrupted(**call) -> SimpleNamespace:
        def train(stop: int | None) -> None:
            raise KeyboardInterrupt("SIGINT")

        task = create_mlm(**call)
        task.train = train
        return task

    monkeypatch.setattr(tasks, "create_mlm", interrupted)
    assert cli.main(["train"]) == 130
    assert "to resume: langmlm resume run" not in caplog.messages
    (Path("run") / "checkpoint-3").mkdir()
    assert cli.main(["train"]) == 130
    assert "to resume: langmlm resume run" in caplog.messages
    caplog.clear()
    (Path("run") / "final_model").mkdir()
    assert cli.main(["train"]) == 130
    assert "all steps are done: run/final_model" in caplog.messages and "to resume" not in caplog.text


def test_a_checkpoint_that_was_pruned(finished: Path, capsys: pytest.CaptureFixture):
    "The error names those that exist."
    status, (line,) = fail(["resume", str(finished / "run" / "checkpoint-1")], capsys)
    last = list_checkpoints(finished / "run")[-1].name
    assert status == 1 and re.search(rf"RUN='.*checkpoint-1' is not a folder; there is (.*, )?{last}$", line)


def test_booleans_are_not_negated_by_their_name(capsys: pytest.CaptureFixture):
    "`--no-packing` is what other tools have; the error says what to write."
    status, (line,) = fail(["train", "--no-packing", "--no-money"], capsys)
    assert status == 2 and "write --packing false instead of --no_packing; 'no_money' is not an option" in line


def test_a_list_may_be_empty():
    "`--baselines` without a value compares with nothing."
    assert parse_words(cli._COMMANDS, ["evaluate", "model", "data.csv", "--baselines"])["baselines"] == []


@pytest.mark.parametrize(("world", "level"), [(None, logging.INFO), ("2", logging.WARNING)])
def test_a_variable_left_over_from_a_launcher(monkeypatch: pytest.MonkeyPatch, world: str | None, level: int):
    "`RANK` alone launches nothing, and silences nothing."
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli._call_with_log(logging.getLogger("langmlm").getEffectiveLevel) == level


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_resuming_changes_no_options(finished: Path, tmp_path: Path, kind: str):
    "The file still describes the run, with its initialization and the sizes that other models name otherwise."
    data = ["--tokenizer", str(finished / "tokenizer"), "--tokenized_dataset", str(finished / "dataset")]
    model = ["--model_type", kind, "--num_hidden_layers", "2", "--hidden_size", "32", "--num_attention_heads", "2"]
    model += ["--initialization", "corpus", "--intermediate_size", "64", "--hidden_dropout_prob", "0.05"]
    run = ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--bf16", "false", "--stop_at_step", "1"]
    assert cli.main(["train", *data, *model, *run]) == cli.main(["resume", str(tmp_path / "run")]) == 0
    assert [file.name for file in list_options(tmp_path / "run")] == ["options.yaml"]
    options = read_options(tmp_path / "run" / "options.yaml")["model_config"]
    assert (options["initialization"], options["hidden_dropout_prob"], options["hidden_size"]) == ("corpus", "0.05", "32")


def test_names_of_files_with_options(tmp_path: Path):
    "The next number follows the last one; an empty file, from a full disk, and files of the user do not count."
    for number, name in enumerate(["options.yaml", "options-2.yaml", "options-3.yaml"]):
        assert save_options(tmp_path, {"tokenizer": str(number)}).name == name
    (tmp_path / "options-2.yaml").unlink()
    (tmp_path / "options_backup.yaml").write_text("tokenizer: mine")
    (tmp_path / "options-4.yaml").touch()
    assert [file.name for file in list_options(tmp_path)] == ["options.yaml", "options-3.yaml"]
    assert save_options(tmp_path, {"tokenizer": "new"}).name == "options-4.yaml"
    assert read_options(list_options(tmp_path)[-1])["tokenizer"] == "new"


def test_a_folder_in_use_gets_no_options(calls: list, capsys: pytest.CaptureFixture):
    "Those of the run that uses it stay the latest."
    lock = lock_folder(Path("run"), "output_dir")
    status, lines = fail(["train"], capsys)
    lock.close()
    assert status == 1 and "output_dir='run' is in use by another run" in lines[-1]
    assert list_options(Path("run")) == []
    assert cli.main(["train"]) == 0 and len(list_options(Path("run"))) == 1


# Results


def test_info(finished: Path, capsys: pytest.CaptureFixture):
    "Every kind of folder is named with its sizes and settings."
    checkpoint = list_checkpoints(finished / "run")[-1]
    steps = checkpoint.name.partition("-")[2]
    expected = {
        "tokenizer": ["kind             ", "tokenizer", "vocab_size", "600"],
        "dataset": ["dataset", "max_length", "32", "documents", "300"],
        "run": ["run", f"{checkpoint.name}, final_model", f"{steps} of {steps}", "learning_rate", "0.002", "num_hidden_layers"],
        f"run/{checkpoint.name}": ["checkpoint", f"{steps} of {steps}", "hidden_size"],
        "run/final_model": ["model", "hidden_size", "32"],
    }
    for name, parts in expected.items():
        assert cli.main(["info", str(finished / name)]) == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in parts), name
    assert "save_total_limit" not in shown


@pytest.mark.parametrize("name", ["tokenizer", "dataset", "checkpoint", "run"])
def test_info_finds_damage(finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture):
    "A changed byte in any file is reported, with status 1."
    folder = list_checkpoints(finished / "run")[-1] if name == "checkpoint" else finished / name
    shutil.copytree(folder, tmp_path / "copy")
    largest = max((path for path in (tmp_path / "copy").rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert cli.main(["info", str(tmp_path / "copy")]) == 1
    assert f"{largest.name} has other content" in capsys.readouterr().out


def test_info_on_a_damaged_manifest_and_on_other_tools(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "A manifest that cannot be read is damage; none at all leaves the question open."
    shutil.copytree(finished / "run" / "final_model", tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text("{")
    assert cli.main(["info", str(tmp_path / "model")]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().out
    (tmp_path / "model" / "manifest.json").unlink()
    assert cli.main(["info", str(tmp_path / "model")]) == 0
    assert "model without a manifest" in capsys.readouterr().out


def test_info_lists_damaged_descriptions(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "A file that would be shown may be the damaged one; the others are checked all the same."
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    (run / "trainer_state.json").write_text("[]")
    for file in (run / "final_model" / "config.json", list_checkpoints(run)[-1] / "trainer_state.json"):
        file.write_bytes(file.read_bytes()[:-9])
    assert cli.main(["info", str(run)]) == 1
    shown = capsys.readouterr().out
    assert "DAMAGED: final_model: config.json" in shown and "trainer_state.json" in shown


def test_plot(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "One curve for each run, with its name; a run without a loss is an error."
    log = [{"step": step, "loss": 5.0 - step, "eval_loss": 6.0 - step} for step in (1, 2)]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    image = tmp_path / "loss.svg"
    assert cli.main(["plot", str(finished / "run"), str(tmp_path / "other"), "--output", str(image)]) == 0
    assert capsys.readouterr().out == f"{image}\n"
    drawn = image.read_text()
    assert drawn.count('<g id="line2d_') >= 3 and drawn.startswith("<?xml")
    (tmp_path / "other" / "log.jsonl").write_text("")
    assert cli.main(["plot", str(tmp_path / "other"), "--output", str(image)]) == 1
    assert image.read_text() == drawn
    for damaged in (b"{\n", b"[1]\n", b"\xff\n"):
        (tmp_path / "other" / "log.jsonl").write_bytes(damaged)
        status, lines = fail(["plot", str(tmp_path / "other"), "--output", str(image)], capsys)
        assert status == 1 and "log.jsonl is damaged" in lines[-1]
    lines = [json.dumps(entry | {"filled": "a\u2028b"}, ensure_ascii=False) + "\n" for entry in log]
    (tmp_path / "other" / "log.jsonl").write_text("".join(lines) + '{"step": 3, "lo', encoding="utf-8")
    assert cli.main(["plot", str(tmp_path / "other"), "--output", str(image)]) == 0  # The last line is being written


def test_bench_writes_nothing(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    "A run of the same options would have these steps; an existing model and a measured number of steps are accepted."
    before = sorted(finished.rglob("*"))
    monkeypatch.chdir(tmp_path)
    data = ["--tokenizer", str(finished / "tokenizer"), "--tokenized_dataset", str(finished / "dataset")]
    words = ["bench", *data, "--max_steps", "50", "--steps", "2", "--use_cpu", "--report_to", "none"]
    words += ["--output_dir", str(finished / "run"), "--run_name", "run"]  # Those of another run
    for model in (["--num_hidden_layers", "1", "--hidden_size", "32"], ["--checkpoint_path", str(finished / "run")]):
        assert cli.main([*words, *model]) == (0 if model[0] == "--checkpoint_path" else 2)
        output = capsys.readouterr()
        if model[0] == "--checkpoint_path":
            size, memory, speed = output.out.splitlines()
            assert " = 50 steps of " in size and "a step needs about" in memory and " tokens/s: " in speed
        else:
            assert "hidden_size must be a multiple of num_attention_heads=12" in output.err
    assert not list(tmp_path.iterdir()) and sorted(finished.rglob("*")) == before


def test_fill_mask(finished: Path, capsys: pytest.CaptureFixture):
    "The folder of a run stands for its final model; every mask has a line."
    assert cli.main(["fill-mask", str(finished / "run"), "The <mask> of <mask>.", "A <mask>.", "--top_k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The <mask> of <mask>." and lines[3] == "A <mask>." and len(lines) == 5
    assert all(line.count("%") == 3 for line in (lines[1], lines[2], lines[4]))


def test_fill_mask_takes_the_mask_of_the_tokenizer(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "As `<mask>` or under its own name."
    folder = shutil.copytree(finished / "run" / "final_model", tmp_path / "model")
    for file in folder.glob("*token*.json"):
        file.write_text(file.read_text().replace("<mask>", "[MASK]"))
    assert cli.main(["fill-mask", str(folder), "The [MASK] of it.", "The <mask> of it.", "--top_k", "1"]) == 0
    named, general = capsys.readouterr().out.replace("<mask>", "[MASK]").split("The [MASK] of it.\n")[1:]
    assert named == general and named.count("%") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text"], "TEXT must contain <mask>, got 'text'"),
        (["<mask>", "--top_k", "0"], "top_k must be 1 to 600, the tokens of the model, got 0"),
        (["<mask>", "--top_k", "2000"], "top_k must be 1 to 600, the tokens of the model, got 2000"),
        (["<mask>", "the <mask>" + " of it" * 200], "TEXT must have at most 32 tokens, got 405: cut it"),
        (["gr\udcf6\udcdfe <mask>"], "TEXT must be UTF-8, got 'gr"),
    ],
)
def test_fill_mask_errors(finished: Path, words: list[str], message: str, capsys: pytest.CaptureFixture):
    "Name the argument, its value, and what the model takes."
    status, lines = fail(["fill-mask", str(finished / "run"), *words], capsys)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"langmlm fill-mask: error: {message}")


def test_fill_mask_needs_a_head(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "A model whose head would be random is an error."
    AutoModelForSequenceClassification.from_pretrained(finished / "run" / "final_model").save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(finished / "run" / "final_model").save_pretrained(tmp_path / "model")
    status, (line,) = fail(["fill-mask", str(tmp_path / "model"), "the <mask>"], capsys)
    assert status == 1 and "of a masked language model: it has no weights for lm_head" in line


def test_evaluate_passes_converted_options(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    "Lists of numbers included; options and defaults are those of the function."
    from langmlm import probe

    parameters = signature(probe.evaluate).parameters
    defaults = {name: parameter.default for name, parameter in signature(cli._evaluate).parameters.items()}
    assert defaults == {name: parameter.default for name, parameter in parameters.items()}
    found = {}

    def evaluate(**options):
        found.update(options)
        return "a table"

    monkeypatch.setattr("langmlm.probe.evaluate", evaluate)
    words = f"evaluate {finished / 'run'} data.csv --learning_rates 1e-3 2e-4 --folds 3 --epochs none --seeds 1 2"
    assert cli.main(words.split()) == 0
    assert found["model"] == str(finished / "run")
    assert (found["learning_rates"], found["folds"], found["epochs"], found["seeds"]) == ([1e-3, 2e-4], 3, None, [1, 2])
    assert capsys.readouterr().out == "a table\n"


def test_completion(capsys: pytest.CaptureFixture, tmp_path: Path):
    "A shell completes commands and options."
    assert cli.main(["--print_completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    words = [("re", 1), ("train --learning_r", 2)]
    for (typed, position), expected in zip(words, ("resume", "--learning_rate")):
        program = f"source completion.bash; COMP_WORDS=(langmlm {typed}) COMP_CWORD={position}; _shtab_langmlm"
        command = ["bash", "-c", f'{program}; echo "${{COMPREPLY[@]}}"']
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout.split() == [expected]
