"Every notebook runs; all are clean and in shape; README.md and the documentation can be made from them."

from pathlib import Path

import pytest
import yaml
from book import notebook_paths, output_problems, read_book, shape_problems, sidebar_links, sidebar_problems
from forks import forked_python, run_notebook
from language import language_problems
from links import link_problems
from package import read_settings
from sandbox import ROOT, changes, copy_project, demand_none, last_lines, project_files, run_command, snapshot, tool

BOOK = ROOT / "nbs"
NAMES = [path.relative_to(BOOK).as_posix() for path in notebook_paths(BOOK)]
FLAGS = set(read_settings(ROOT)["tst_flags"].split())  # Cells with these directives are not run


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of the project in which notebooks run, one after another, because they leave it as it was."
    return copy_project(tmp_path_factory.mktemp("book") / "project")


@pytest.mark.parametrize("name", NAMES[::-1])  # Tutorials take longest
def test_notebook_runs(book: Path, name: str):
    "Every cell runs, and leaves nothing behind."
    before = snapshot(book)
    run_notebook(book / "nbs" / name, FLAGS)
    demand_none(changes(before, snapshot(book)))


def test_notebooks_are_clean(project: Path):
    "`nbdev_clean` changes nothing."
    before = snapshot(project / "nbs")
    output = run_command([tool("nbdev_clean")], project, project)
    assert "Failed to clean" not in output, last_lines(output)
    demand_none(changes(before, snapshot(project / "nbs")))


@pytest.mark.parametrize("find_problems", [shape_problems, output_problems])
def test_notebooks_keep_their_shape(find_problems):
    "They open with a title and are not too long; stored outputs have no errors and no paths of a machine."
    book = read_book(BOOK)
    demand_none(
        [f"{notebook.path.relative_to(BOOK)}: {problem}" for notebook in book for problem in find_problems(notebook)]
    )


def test_the_sidebar_is_complete():
    "It links to every notebook once."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    demand_none(sidebar_problems(NAMES, sidebar_links(site["sidebar"]["contents"])))


def test_links_lead_somewhere():
    "Links between notebooks and pages, with their anchors."
    demand_none(link_problems(ROOT, list(project_files(ROOT))))


def test_plain_language():
    "The field's words in prose, names, comments and messages: see tools/language.py."
    demand_none(language_problems(ROOT, list(project_files(ROOT))))


def test_readme_is_fresh(project: Path):
    "README.md and its figures are what nbs/index.ipynb makes."
    run_command([forked_python(), "tools/readme.py"], project, project)


@pytest.mark.slow
def test_docs_can_be_prepared(project: Path):
    "The documentation builds up to the point where Quarto takes over."
    output = run_command([forked_python(), "tools/prepare_docs.py"], project, project)
    assert [name for name in NAMES if not (project / "_proc" / name).exists()] == []
    assert "Found cells containing imports" not in output, last_lines(output)
