"API entries of the documentation: signatures without links, docments of functions, dataclasses and named tuples."

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

from langmlm import tasks
from langmlm.model.roberta import ModelConfig
from langmlm.probe import evaluate as probe_evaluate
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig
from langmlm.train.evaluate import evaluate as masked_evaluate
from tools.showdoc import WIDTH, ApiRenderer, entry, escape, exported, show_default

OPTIONS = Path(__file__).parents[2] / "nbs" / "options.ipynb"


def make_thing(
    name: str,  # One of `create_mlm` and `create_tokenizer`
    size: int | None = None,  # In `a | b` form, at least 1; None: *all* of <s>
    *,
    mode: str = "a|b",
) -> dict[str, int]:  # Counts by `name`
    "Make a thing, see `create_mlm`."


def collect(
    *things: str,  # What is collected
    size: int = 1,  # Of each
    **options: int,  # Of the collection
) -> list[str]:
    "Collect things."


@dataclass
class Settings:
    "Settings of a thing."

    size: int = 3  # Number of `parts`
    # The text above a field
    # counts too
    label: str = "x"
    names: list[str] = field(
        default_factory=list,
    )  # On the last line
    bare: float = 0.5

    @cached_property
    def double(self) -> int:
        "Twice the size."
        return 2 * self.size

    def grow(
        self,
        by: int = 1,  # Added to `size`
    ) -> "Settings":  # A larger copy
        "Make it larger."

    def _hidden(self):
        "Not shown."


@dataclass
class MoreSettings(Settings):
    "Settings and one more."

    extra: int = 0  # The one more


class Sizes(NamedTuple):
    "Sizes of a thing."

    width: int  # In `cm`
    height: int = 2  # In `mm`


class Plain:
    "A class that is no dataclass."

    def __init__(
        self,
        corpus: str,  # All documents
    ):
        self.corpus = corpus

    @classmethod
    def load(cls, folder: str) -> "Plain":
        "Read it from a folder."


def rows(text: str) -> dict[str, list[str]]:
    "Cells of all table rows, by the first one."
    cells = [
        re.split(r" (?<!\\)\| ", line[2:].removesuffix(" |")) for line in text.splitlines() if line.startswith("| ")
    ]
    return {re.sub("</?code[^>]*>|[`*]", "", row[0]): [cell.strip() for cell in row[1:]] for row in cells}


def code_of(text: str) -> str:
    "The first block of code."
    return re.search(r"```python\n(.*?)\n```", text, re.S)[1]


def test_function_has_call_docstring_and_table():
    shown = entry(make_thing, "make_thing", 3)
    assert shown.startswith("### make_thing\n")
    assert code_of(shown) == "make_thing(name, size=None, *, mode='a|b') -> dict[str, int]"
    assert "Make a thing, see `create_mlm`." in shown
    table = rows(shown)
    assert table["parameter"] == ["type", "default", "meaning"]
    assert table["name"] == ["str", "", "One of `create_mlm` and `create_tokenizer`"]
    assert table["returns"] == [r"dict\[str, int\]", "", "Counts by `name`"]


def test_starred_parameters_have_their_comments():
    shown = entry(collect, "collect", 3)
    assert code_of(shown) == "collect(*things, size=1, **options) -> list[str]"
    meanings = {name: cells[-1] for name, cells in rows(shown).items() if not name.startswith(("-", "parameter"))}
    assert meanings == {"things": "What is collected", "size": "Of each", "options": "Of the collection"}
    assert "<code>*things</code>" in shown and "<code>**options</code>" in shown


def test_code_never_holds_links_or_comments():
    for symbol in (make_thing, Settings, Sizes, tasks.create_mlm, tasks.create_tokenizer, TrainingConfig):
        for block in re.findall(r"```python\n(.*?)\n```", entry(symbol, symbol.__name__, 3), re.S):
            assert "`" not in block and "](" not in block and "#" not in block


def test_pipes_and_markup_do_not_break_the_table():
    table = rows(entry(make_thing, "make_thing", 3))
    assert table["size"] == [
        r"int \| None",
        "`None`",
        r"In <code>a &#124; b</code> form, at least 1; None: \*all\* of \<s\>",
    ]
    assert table["mode"][1] == "<code>'a&#124;b'</code>"
    assert escape("constant_with_warmup and _x_") == r"constant_with_warmup and \_x\_"


def test_dataclass_fields_have_their_comments():
    shown = entry(Settings, "Settings", 3)
    table = rows(shown)
    assert table["size"] == ["int", "`3`", "Number of `parts`"]
    assert table["label"] == ["str", "`'x'`", "The text above a field counts too"]
    assert table["names"] == [r"list\[str\]", "`...`", "On the last line"]
    assert table["bare"] == ["float", "`0.5`", ""]
    assert rows(entry(MoreSettings, "MoreSettings", 3))["size"] == table["size"]
    assert rows(entry(MoreSettings, "MoreSettings", 3))["extra"] == ["int", "`0`", "The one more"]


def test_methods_and_properties_have_entries():
    shown = entry(Settings, "Settings", 3)
    assert "| `double` | int | Twice the size. |" in shown
    assert "#### Settings.grow\n" in shown and "Settings.grow(by=1)" in shown
    assert rows(shown)["by"] == ["int", "`1`", "Added to `size`"]
    assert "_hidden" not in shown
    assert "#### Plain.load\n\n```python\nPlain.load(folder)" in entry(Plain, "Plain", 3)
    assert rows(entry(Plain, "Plain", 3))["corpus"] == ["str", "All documents"]


def test_named_tuple_fields_have_their_comments():
    table = rows(entry(Sizes, "Sizes", 3))
    assert table == {
        "parameter": ["type", "default", "meaning"],
        "-" * 24: ["-" * 20, "-" * 14, "-" * 60],
        "width": ["int", "", "In `cm`"],
        "height": ["int", "`2`", "In `mm`"],
    }


@pytest.mark.parametrize("config", [TokenizerConfig, ModelConfig, TrainingConfig])
def test_long_calls_are_wrapped_and_complete(config):
    shown = entry(config, config.__name__, 3)
    lines = code_of(shown).splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= WIDTH
    compile(code_of(shown).replace("*, ", ""), "call", "exec")
    table = rows(shown)
    for name in config.__dataclass_fields__:
        assert f"{name}=" in code_of(shown) and name in table
        assert table[name][-1], f"{name} has no meaning"


def test_defaults_are_shown_as_code():
    assert [show_default(value) for value in (1e-06, "a b", None, len, range(3), object())] == [
        "1e-06",
        "'a b'",
        "None",
        "len",
        "range(0, 3)",
        "...",
    ]
    assert show_default("x" * 50) == "..."


def test_tasks_document_their_methods():
    for task in (tasks.MLMTask, tasks.TokenizerTask):
        assert f"#### {task.__name__}.train\n" in ApiRenderer(task)._repr_markdown_()


def test_renderer_links_to_the_source():
    shown = ApiRenderer(tasks.create_mlm)._repr_markdown_()
    line = re.search(r"\[source\]\(https://\S+/langmlm/tasks\.py#L(\d+)\)", shown)[1]
    source = Path(tasks.__file__).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1].startswith("def create_mlm(")


def test_build_shows_the_package_and_not_its_executed_twin():
    twin = type("TrainingConfig", (), {"__doc__": "Executed from a cell."})
    twin.__module__ = "__main__"
    assert rows(ApiRenderer(twin)._repr_markdown_()) == rows(ApiRenderer(TrainingConfig)._repr_markdown_())


@pytest.mark.parametrize("original", [masked_evaluate, probe_evaluate])
def test_functions_of_one_name_are_told_apart(original):
    def twin(): ...

    twin.__module__, twin.__qualname__, twin.__doc__ = "__main__", "evaluate", original.__doc__
    assert exported(twin) is original


def test_stored_options_are_those_of_the_configs():
    cells = json.loads(OPTIONS.read_text(encoding="utf-8"))["cells"]
    outputs = [output["data"]["text/markdown"] for cell in cells for output in cell.get("outputs", [])]
    stored = ["".join(text).partition("### ")[2] for text in outputs]
    configs = (TokenizerConfig, ModelConfig, TrainingConfig)
    assert stored == [entry(config, config.__name__, 3).removeprefix("### ") for config in configs]
