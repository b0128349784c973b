"The checks of tools/book.py find the faults they are for, and let sound notebooks pass."

import json
from pathlib import Path

import pytest
from book import (
    Cell,
    Notebook,
    exported_names,
    import_faults,
    lesson_faults,
    notebook_paths,
    output_faults,
    read_notebook,
    shape_faults,
    sidebar_faults,
    used_names,
)

TITLE = Cell("markdown", "# Corpus\n\n> Documents.", [])

def code(source: str, *outputs: dict) -> Cell:
    "A code cell."
    return Cell("code", source, list(outputs))

def notebook(*cells: Cell, path: str = "10_corpus.ipynb") -> Notebook:
    "A notebook that was never on disk."
    return Notebook(Path(path), [TITLE, *cells])

@pytest.mark.parametrize(
    "source",
    [
        "from langmlm.model.roberta import build"
        "from .model import build",
        "import langmlm.model.roberta",
        "from langmlm import model",
        "from . import model",
        "def late():\n    from langmlm.model.roberta import build"
    ],
)
def test_an_import_from_a_later_chapter_is_a_fault(source):
    sources = {"corpus": source, "model": "import torch\nfrom langmlm.text.corpus import docstrings"}
    (fault,) = import_faults(["corpus", "model"], sources, "langmlm")
    assert fault == "corpus imports model, which no earlier chapter exports"

def test_sound_imports_pass():
    sources = {"corpus": "import model\nfrom langmlm import __version__", "model": "from .corpus import docstrings"}
    assert import_faults(["corpus", "model"], sources, "langmlm") == []

def test_a_module_without_a_notebook_is_a_fault():
    assert import_faults(["corpus"], {"corpus": "", "leftover": ""}, "langmlm") == ["leftover belongs to no notebook"]

def test_a_name_needs_a_lesson_that_uses_it():
    exported = code("#| export\ndef count(): pass\ndef read(): return count()\nLIMIT = 3")
    lesson = code("from langmlm.text.corpus import LIMIT\ncount()  # read"
    module = "__all__ = ['LIMIT', 'count', 'read']"
    assert lesson_faults(notebook(exported, lesson), module) == ["LIMIT has no lesson", "read has no lesson"]
    assert lesson_faults(notebook(exported, code("%time count()\nread(), corpus.LIMIT\ncount")), module) == []

def test_names():
    assert exported_names("import os\n__all__ = ['one',\n 'two']") == ["one", "two"]
    assert used_names("%matplotlib inline\nvalue.attribute") == {"value", "attribute"}

def test_directives_end_with_the_first_line_of_code():
    cell = code("#| exports\n#| eval: false\nvalue = 1\n#| hide")
    assert cell.directives == {"exports": "", "eval": "false"} and cell.is_exported

def test_a_notebook_may_not_grow_too_long():
    assert shape_faults(notebook(*[code("1")] * 59)) == []
    assert shape_faults(notebook(*[code("1")] * 60)) == ["61 cells, more than 60"]
    assert shape_faults(notebook(code("#| export\n" + "a = 1\n" * 250))) == []
    assert shape_faults(notebook(code("#| export\n" + "a = 1\n" * 251))) == ["251 exported lines, more than 250"]

@pytest.mark.parametrize("title", ["# Corpus", "Corpus\n> Documents.", "# Corpus\n> Documents.\n\nThis would be lost."])
def test_a_title_cell_holds_the_title_only(title):
    assert shape_faults(Notebook(Path("a.ipynb"), [Cell("markdown", title, [])]))

@pytest.mark.parametrize("source", ["import os\nos.sep", "def late():\n    import os", "#| hide\nimport os\nx = 1"])
def test_imports_stand_alone_in_lessons(source):
    assert shape_faults(notebook(code(source))) == ["cell 1 imports and does something else too"]
    assert shape_faults(notebook(code(f"#| export\n{source}"), code(f"#| eval: false\n{source}"))) == []
    assert shape_faults(notebook(code("%matplotlib inline\nimport os\nfrom os import path"))) == []

@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "error", "ename": "ValueError"},
        {"output_type": "stream", "text": ["in /home/someone/project"]},
        {"output_type": "execute_result", "data": {"text/plain": "PosixPath('/tmp/abc')"}},
    ],
)
def test_a_stored_error_or_machine_path_is_a_fault(output):
    assert len(output_faults(notebook(code("1", output)))) == 1

def test_sound_outputs_pass():
    output = {"output_type": "stream", "text": ["3 of 4 lines in data/home/text.txt"]}
    assert output_faults(notebook(code("1", output))) == []

def test_notebooks_are_read_in_order(tmp_path):
    for name in ("100_last", "20_second", "10_first", "index", "tutorials/first", ".checkpoints/10_first", "_draft"):
        path = tmp_path / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["#| default_exp ", "first"]}]}))
    names = [path.relative_to(tmp_path).as_posix() for path in notebook_paths(tmp_path)]
    assert names == ["index.ipynb", "10_first.ipynb", "20_second.ipynb", "100_last.ipynb", "tutorials/first.ipynb"]
    assert read_notebook(tmp_path / "index.ipynb").module == "first"

def test_the_sidebar_has_every_notebook_in_order():
    book = [notebook(path=f"nbs/{name}.ipynb") for name in ("index", "10_first", "20_second")]
    listed = ["index.ipynb", "10_first.ipynb", "20_second.ipynb"]
    assert sidebar_faults(book, Path("nbs"), listed) == []
    assert sidebar_faults(book, Path("nbs"), listed[::-1]) == ["the sidebar is not in chapter order"]
    assert sidebar_faults(book, Path("nbs"), listed[:2])
