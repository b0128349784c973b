"Configs report all invalid options at once, by name, value and remedy."

from dataclasses import dataclass
from pathlib import Path

import pytest

from langmlm.config import SPECIAL_TOKENS, ConfigError, check_config, find_path_error, make_config
from langmlm.model.roberta import ModelConfig
from langmlm.tokens.processes import unfinished_folder
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig


class Bytes:
    "A path of bytes."

    def __fspath__(self) -> bytes:
        return b"run"


@dataclass(frozen=True)
class Example:
    "Options of every type that configs use."

    steps: int = 100
    learning_rate: float | None = None
    packing: bool = True
    optim: str = "adamw"
    shard: tuple | None = None

    def __post_init__(self):
        check_config(self, "example")


@pytest.mark.parametrize(
    "changes",
    [{}, {"learning_rate": 1}, {"learning_rate": 0.5}, {"learning_rate": None}, {"shard": (0, 2)}, {"steps": -1}],
)
def test_valid_types(changes: dict):
    "A whole number is a valid float, and None where the annotation has it."
    assert all(getattr(Example(**changes), name) == value for name, value in changes.items())


def test_an_integer_becomes_a_float():
    "So that a dataset made with 0, and one made with the 0.0 of the command line, have the same fingerprint."
    assert type(Example(learning_rate=1).learning_rate) is float and type(Example(steps=1).steps) is int
    one, two = TokenizerConfig(mixing=[2, 1], validation_fraction=0), TokenizerConfig(mixing=(2.0, 1.0), validation_fraction=0.0)
    assert repr(one) == repr(two) and type(TrainingConfig(num_train_epochs=3).num_train_epochs) is int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": 1.0}, "steps must be int, got 1.0"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": None}, "steps must be int, got None"),
        ({"learning_rate": True}, "learning_rate must be float or None, got True"),
        ({"learning_rate": "1e-3"}, "learning_rate must be float or None, got '1e-3'"),
        ({"packing": 1}, "packing must be bool, got 1"),
        ({"optim": None}, "optim must be str, got None"),
        ({"shard": [0, 2]}, "shard must be tuple or None, got [0, 2]"),
    ],
)
def test_invalid_types(changes: dict, message: str):
    "The error names the option, its types and the value; True is not accepted as a number."
    with pytest.raises(ConfigError) as caught:
        Example(**changes)
    assert caught.value.errors == [message] and str(caught.value) == f"example is invalid:\n- {message}"


def test_rules(monkeypatch: pytest.MonkeyPatch):
    "Each row covers its options, None is always valid, and conflicts are reported too, unless the type of their options is wrong."
    rules = [("steps learning_rate", lambda value: value > 0, "above 0"), ("optim", ("adamw", "muon"))]
    conflict = ["steps contradicts optim"]
    check_config(Example(), "example", rules)
    for changes, expected in (
        ({"steps": 0, "learning_rate": -1.0}, ["steps must be above 0, got 0", "learning_rate must be above 0, got -1.0"]),
        ({"optim": "sgd"}, ["optim must be one of adamw, muon, got 'sgd'"]),
    ):
        with pytest.raises(ConfigError) as caught:
            check_config(Example(**changes), "example", rules, lambda config: conflict)
        assert caught.value.errors == expected + conflict

    def find_conflicts(config: Example) -> list[str]:
        compared.append(config.learning_rate)  # The default, since the value cannot be compared
        return [*conflict, "learning_rate is too high for optim"]

    compared = []
    with pytest.raises(ConfigError) as caught:
        monkeypatch.setattr(Example, "__post_init__", lambda config: check_config(config, "example", rules, find_conflicts))
        Example(steps=0, learning_rate="high")
    expected = ["learning_rate must be float or None, got 'high'", "steps must be above 0, got 0"]
    assert caught.value.errors == expected + conflict and compared == [Example.learning_rate]


def test_all_errors_in_one_message():
    "Unknown keys and invalid values are reported together, under the name that the user knows."
    with pytest.raises(ConfigError) as caught:
        make_config(Example, "training_config", {"step": 5, "learning_rates": 1, "steps": "many", "packing": 0})
    assert caught.value.name == "training_config" and isinstance(caught.value, ValueError)
    assert caught.value.errors == [
        "'step' is not an option; did you mean 'steps'?",
        "'learning_rates' is not an option; did you mean 'learning_rate'?",
        "steps must be int, got 'many'",
        "packing must be bool, got 0",
    ]
    assert str(caught.value).startswith("training_config is invalid:\n- ") and str(caught.value).count("\n- ") == 4


def test_strange_keys():
    "Any key is named, also one that is no string; a suggestion must be close."
    with pytest.raises(ConfigError) as caught:
        make_config(Example, "example", {"": 1, "zzzzzzzz": 2, 7: 3})
    assert caught.value.errors == ["'' is not an option", "'zzzzzzzz' is not an option", "7 is not an option"]
    meanings = {"learning_rates": "learning_rate", "rate": "learning_rate", "lr": "learning_rate", "optimizer": None}
    for key, meant in (meanings | {"learn_r": "learning_rate", "step": "steps", "s": None, "ate": None}).items():
        with pytest.raises(ConfigError) as caught:
            make_config(Example, "example", {key: 1})
        expected = f"; did you mean {meant!r}?" if meant else ""
        assert caught.value.errors == [f"{key!r} is not an option{expected}"]


def test_reasons():
    "A config that knows why a name does not apply says so instead of a suggestion."

    class Explained(Example):
        "Knows one name."

        @staticmethod
        def explain(key: str) -> str | None:
            return "steps are counted otherwise" if key == "step" else None

    with pytest.raises(ConfigError) as caught:
        make_config(Explained, "example", {"step": 1, "stepz": 1})
    assert caught.value.errors == [
        "'step' is not an option: steps are counted otherwise",
        "'stepz' is not an option; did you mean 'steps'?",
    ]


def test_long_values():
    "A message stays short, and any integer can be shown."
    for value in (10**10_000, -(10**10_000), "x" * 10_000, list(range(10_000))):
        with pytest.raises(ConfigError) as caught:
            Example(packing=value)
        assert caught.value.errors[0].startswith("packing must be bool, got ") and len(str(caught.value)) < 200


@pytest.mark.parametrize("path", [None, "", "run", Path("a") / "b", "~/run", "ä" * 127, "/" + "x/" * 1_000])
def test_paths(path):
    "Ordinary paths, in any script."
    assert find_path_error(path) is None


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 256, "ä" * 128, "a/" + "x" * 256, "x/" * 3_000, Bytes()])
def test_no_paths(path):
    "Strings that no file system takes, or that cannot be stored as JSON."
    assert find_path_error(path).startswith("must be a path")


@pytest.mark.parametrize("name", ["path_to_save_tokenizer", "path_to_save_dataset"])
def test_room_for_unfinished_work(name: str, tmp_path):
    "Folders whose name leaves no room for what is added to it during the work are errors, not only at the end."
    path = tmp_path / ("x" * 240) / ("ä" * 115)
    unfinished_folder(Path(getattr(TokenizerConfig(**{name: path}), name)), "0" * 32).mkdir(parents=True)
    for options in ({name: f"{path}x"}, {"path_to_save_dataset": path, "shard": (0, 2)}):
        with pytest.raises(ConfigError, match="must be a path that ends in at most 230 bytes, .*, got "):
            TokenizerConfig(**options)


def test_dataset_folder():
    "A part has a folder of its own, whatever the spelling of the path."
    for path in ("a/b", "a/b/", Path("a/b")):
        assert TokenizerConfig(path_to_save_dataset=path, shard=[1, 3]).dataset_folder == "a/b.part-1-of-3"
    assert TokenizerConfig().dataset_folder == "./tokenized_dataset"
    with pytest.raises(ConfigError, match="shard must be"):
        TokenizerConfig(shard=[1])


@pytest.mark.parametrize("kind", [TokenizerConfig, ModelConfig, TrainingConfig])
def test_configs_of_the_tasks(kind: type):
    "None and {} mean the defaults, a config is returned as it is, and anything else is an error."
    config = make_config(kind, "some_config", {})
    assert isinstance(config, kind) and isinstance(make_config(kind, "some_config", None), kind)
    assert make_config(kind, "some_config", config) is config
    for values in ("roberta-base", ["steps"], 3, False):
        with pytest.raises(ConfigError, match="some_config is invalid:\n- it must be a dict, got "):
            make_config(kind, "some_config", values)


def test_default_tokenizer_config():
    "Configs are compared by value."
    assert make_config(TokenizerConfig, "tokenizer_config", {"vocab_size": 1_000}).vocab_size == 1_000
    assert make_config(TokenizerConfig, "tokenizer_config", None) == TokenizerConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 2**24 + 1}, "max_length must be 3 (<s>, one token, </s>) to 16,777,216, got 16777217"),
        ({"vocab_size": 10**30}, "vocab_size must be at most 10,000,000, got 1000"),
        ({"vocab_size": 2_000_000_000}, "vocab_size must be at most 10,000,000, got 2000000000"),
        ({"min_frequency": 10**30}, "min_frequency must be 1 to 2,147,483,647, got 1000"),
        ({"num_workers": 0}, "num_workers must be 1 to 2,147,483,647, got 0"),
        ({"special_tokens": [*SPECIAL_TOKENS, "\ud800"]}, "special_tokens must be different, non-empty strings of valid Unicode"),
        ({"shard": "0 2"}, "shard must be tuple or list or None, got '0 2'"),
        ({"shard": (0, "2")}, "shard must be None or (i, n) with integers 0 <= i < n, got (0, '2')"),
        ({"shard": (False, 2)}, "shard must be None or (i, n) with integers 0 <= i < n, got (False, 2)"),
    ],
)
def test_bounds_of_the_tokenizer(changes: dict, message: str):
    "Values that the tokenizer or a file cannot hold are found before the text is read."
    with pytest.raises(ConfigError) as caught:
        TokenizerConfig(**changes)
    assert len(caught.value.errors) == 1 and caught.value.errors[0].startswith(message)
    TokenizerConfig(max_length=2**24, vocab_size=10**7, min_frequency=2**31 - 1, special_tokens=[*SPECIAL_TOKENS, "🌊"])


def test_training_config_errors():
    "Two unknown options and an invalid value are three errors."
    with pytest.raises(ConfigError) as caught:
        make_config(TrainingConfig, "training_config", {"learning_rates": 1e-4, "num_train_epoch": 3, "save_steps": 0})
    assert len(caught.value.errors) == 3
