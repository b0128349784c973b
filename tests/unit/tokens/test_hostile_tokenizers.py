"A tokenizer folder from elsewhere runs no code, asks nothing, and ends in an error where it cannot be used."

import ast
import re
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import forked_python

from langmlm.tokens import tokenizer as module
from langmlm.tokens.encode import Encoder
from langmlm.tokens.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer, train_tokenizer

PACKAGE = Path(module.__file__).parent.parent


@pytest.fixture(scope="module")
def folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tokenizer with a normalizer."
    folder = tmp_path_factory.mktemp("hostile") / "tokenizer"
    save_tokenizer(train_tokenizer(documents[:300], TokenizerConfig(vocab_size=400, lowercase=True)), folder)
    return folder


def change(folder: Path, target: Path, file: str, changes: Callable[[dict], Any]) -> Path:
    "Copy a tokenizer and change one of its JSON files in place, or replace its text by what `changes` returns."
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        text = changes(content) if name == file else None
        (target / name).write_text(text if isinstance(text, str) else json.dumps(content), encoding="utf-8")
    return target


# Code


CODE = """
from pathlib import Path
from transformers import RobertaTokenizer
Path({marker!r}).touch()

class Tokenizer(RobertaTokenizer):
    pass
"""
LOAD = """
import sys
from langmlm.tokens.tokenizer import load_tokenizer
for folder in sys.argv[1:]:
    try:
        load_tokenizer(folder)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("answer", [None, "y\n" * 20], ids=["closed", "yes"])
def test_code_is_never_run(folder: Path, tmp_path: Path, answer: str | None):
    "Without asking: neither a closed input nor one that says yes makes a difference, nor a folder that trusts itself."
    marker, hostile = tmp_path / "marker", {}
    for tokenizer_class in (None, "Tokenizer", "RobertaTokenizer"):
        for trust in (None, True):
            settings = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}
            settings |= {"tokenizer_class": tokenizer_class, "trust_remote_code": trust}

            def add_code(config: dict, settings: dict = settings) -> str:
                return json.dumps({name: value for name, value in (config | settings).items() if value is not None})

            target = change(folder, tmp_path / f"{tokenizer_class}-{trust}", "tokenizer_config.json", add_code)
            (target / "code.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
            (target / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Tokenizer"}}', encoding="utf-8")
            hostile[target] = tokenizer_class
    options = {"stdin": subprocess.DEVNULL} if answer is None else {"input": answer}
    command = [forked_python(), "-c", LOAD, *hostile]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, **options)
    assert not marker.exists() and "[y/N]" not in done.stdout + done.stderr
    for target, tokenizer_class in hostile.items():
        refused = f"tokenizer={str(target)!r} needs code of its own, which is never run" in done.stdout
        assert refused == (tokenizer_class != "RobertaTokenizer")  # Which needs no code


def test_only_calls_that_refuse_code():
    "Every automatic class of `transformers` that the package loads with is told not to run code."
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loading = [call for call in calls if re.fullmatch(r"(Auto\w+|kind)\.from_pretrained", ast.unparse(call.func))]
    refused = ["trust_remote_code=False" in map(ast.unparse, call.keywords) for call in loading]
    assert len(loading) >= 4 and all(refused)


# Damage


DEEP = 100_000


def set_value(*path: str | int, value: Any) -> Callable[[dict], None]:
    "A change that sets one value."

    def change_value(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change_value


WRONG = {
    f"{'.'.join(map(str, path))}={value!r}": set_value(*path, value=value)
    for path in (
        *(["version"], ["truncation"], ["added_tokens"], ["normalizer"], ["pre_tokenizer"], ["post_processor"]),
        *(["model"], ["model", "vocab"], ["model", "merges"], ["model", "vocab", "a"], ["added_tokens", 4, "id"]),
    )
    for value in (7, "x", {}, True)
    if (path, value) not in ((["model", "vocab", "a"], 7), (["added_tokens", 4, "id"], 7))
}
DAMAGED = WRONG | {
    "no JSON": lambda content: "{",
    "empty": lambda content: "",
    "deep list": lambda content: "[" * DEEP + "]" * DEEP,
    "deep normalizer": lambda content: (
        json.dumps(content)[:-1] + ',"normalizer":' + '{"type":"Sequence","normalizers":[' * DEEP + "]}" * DEEP + "}"
    ),
    "id beyond the vocabulary": set_value("model", "vocab", "a", value=400),
    "absurd id": set_value("model", "vocab", "a", value=2**31),
    "largest id": set_value("model", "vocab", "a", value=2**32 - 1),
    "id of 64 bits": set_value("model", "vocab", "a", value=2**63),
    "negative id": set_value("model", "vocab", "a", value=-1),
    "half a regular expression": set_value(
        "pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tokenizers(folder: Path, tmp_path: Path, damage: str):
    "Wrong types, nesting and numbers are errors that name the folder, soon."
    damaged, began = change(folder, tmp_path / "damaged", "tokenizer.json", DAMAGED[damage]), time.perf_counter()
    with pytest.raises(ValueError, match=f"tokenizer='{damaged}' cannot be "):
        load_tokenizer(damaged)
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("key", ["mask_token", "tokenizer_class", "added_tokens_decoder", "auto_map", "init_inputs"])
def test_damaged_settings(folder: Path, tmp_path: Path, key: str):
    "The same for the settings beside it."
    damaged = change(folder, tmp_path / "damaged", "tokenizer_config.json", set_value(key, value=7))
    with pytest.raises(ValueError, match=f"tokenizer='{damaged}' cannot be read: "):
        load_tokenizer(damaged)


# Time


def split_at(pattern: str) -> Callable[[dict], None]:
    "A change of the pre-tokenizer to a regular expression."
    value = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return set_value("pre_tokenizer", value=value)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(1+)+[^1!]", r"(?:\p{L}|\p{L}\p{L})+\z"])
def test_backtracking(folder: Path, tmp_path: Path, pattern: str):
    "A regular expression that takes exponential time is an error when the tokenizer is loaded."
    hostile = change(folder, tmp_path / "hostile", "tokenizer.json", split_at(pattern))
    with pytest.raises(ValueError, match="it fails on a short text: .* may backtrack too much"):
        load_tokenizer(hostile)


def test_slow_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "One that stays just below the limit of the backend, at every character, ends at ours."
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.5)
    hostile = change(folder, tmp_path / "hostile", "tokenizer.json", split_at(r"(?:a|aa){1,22}[^a!]"))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="a text of .* characters takes more than 0.5 seconds"):
        load_tokenizer(hostile)
    assert time.perf_counter() - began < 30


def test_backtracking_on_other_text(folder: Path, tmp_path: Path):
    "What the short text does not show is an error while encoding, from the backend's own limit."
    hostile = change(folder, tmp_path / "hostile", "tokenizer.json", split_at(r"(zq+)+$|(q+)+$"))
    encode = Encoder(load_tokenizer(hostile))
    encode(["the tokenizer is fine"])
    with pytest.raises(RuntimeError, match="the tokenizer fails on a text: .*use another tokenizer"):
        encode(["q" * 60 + "!"])


def test_good_tokenizers_pass(folder: Path, tmp_path: Path):
    "The same folder without a change loads."
    assert len(load_tokenizer(change(folder, tmp_path / "same", "tokenizer.json", lambda content: None))) == 400
