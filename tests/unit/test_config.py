"Configs report all invalid options at once, by name, value and remedy."

from dataclasses import dataclass

import pytest

from langmlm.config import ConfigError, find_type_errors, make_config
from langmlm.model.roberta import ModelConfig
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig


@dataclass(frozen=True)
class Example:
    "Options of every type that configs use."

    steps: int = 100
    learning_rate: float | None = None
    packing: bool = True
    optim: str = "adamw"
    shard: tuple | None = None

    def __post_init__(self):
        if errors := find_type_errors(self):
            raise ConfigError("example", errors)


@pytest.mark.parametrize(
    "changes",
    [{}, {"learning_rate": 1}, {"learning_rate": 0.5}, {"learning_rate": None}, {"shard": (0, 2)}, {"steps": -1}],
)
def test_valid_types(changes: dict):
    "A whole number is a valid float, and None where the annotation has it."
    assert find_type_errors(Example(**changes)) == []


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
    "Any key gets a suggestion, also one that resembles no option or is no string."
    with pytest.raises(ConfigError) as caught:
        make_config(Example, "example", {"": 1, "zzzzzzzz": 2, 7: 3})
    assert len(caught.value.errors) == 3 and all("did you mean '" in error for error in caught.value.errors)


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


def test_training_config_errors():
    "Two unknown options and an invalid value are three errors."
    with pytest.raises(ConfigError) as caught:
        make_config(TrainingConfig, "training_config", {"learning_rates": 1e-4, "num_train_epoch": 3, "save_steps": 0})
    assert len(caught.value.errors) == 3
