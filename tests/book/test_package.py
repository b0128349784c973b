"The package is what the notebooks export, keeps to its layers and budgets, and installs with what it declares."

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from book import demonstration_problems, read_book
from empty_environment import install
from package import (
    budget_problems,
    file_problems,
    import_graph,
    imported_libraries,
    layer_problems,
    measure_package,
    pin_problems,
    read_package,
    read_settings,
    requirement_problems,
)
from sandbox import ROOT, changes, demand_none, run_command, snapshot, tool

from langmlm.cli import main

PACKAGE = "langmlm"
SOURCES = read_package(ROOT / PACKAGE)


def test_export_is_fresh(project: Path):
    "The committed package is what the notebooks export."
    before = snapshot(project / PACKAGE)
    for module in set((project / PACKAGE).rglob("*.py")) - {project / PACKAGE / "__main__.py"}:  # Written by hand
        module.unlink()
    run_command([tool("nbdev_export")], project, project)
    demand_none(changes(before, snapshot(project / PACKAGE)))


def test_every_module_has_a_notebook():
    "And every notebook that exports one has a module."
    modules = {notebook.module for notebook in read_book(ROOT / "nbs") if notebook.module}
    assert set(SOURCES) == modules - {"__init__"}


def test_imports_point_downwards():
    "Layers, private names, and what reads no files."
    graph, problems = import_graph(SOURCES, PACKAGE)
    demand_none(problems + layer_problems(graph) + file_problems(graph))


def test_budgets(record_property):
    "Modules, lines, public names and the longest chain of imports; the summary shows them."
    size = measure_package(SOURCES, import_graph(SOURCES, PACKAGE)[0])
    record_property("summary", str(size))
    demand_none(budget_problems(size))


def test_every_public_name_has_a_demonstration():
    "In the notebook that exports it."
    problems = [
        f"{notebook.path.relative_to(ROOT)}: {problem}"
        for notebook in read_book(ROOT / "nbs")
        if notebook.module in SOURCES
        for problem in demonstration_problems(notebook, SOURCES[notebook.module])
    ]
    demand_none(problems)


def test_requirements_are_what_is_imported():
    "No library is imported undeclared, and none is declared in vain."
    demand_none(requirement_problems(imported_libraries(SOURCES, PACKAGE), read_settings(ROOT)["requirements"]))


def test_constraints_are_in_step():
    "constraints.txt pins every requirement to a version that settings.ini allows."
    settings = read_settings(ROOT)
    requirements = settings["requirements"] + " " + settings["dev_requirements"]
    demand_none(pin_problems(requirements, (ROOT / "constraints.txt").read_text(encoding="utf-8")))


def test_ruff_finds_nothing():
    "In scripts, tests and notebooks; `ruff.toml` has the rules."
    run_command([tool("ruff"), "check", "--no-cache", "."], ROOT)


def test_the_command_is_installed():
    "The entry point and `python -m langmlm` are the same function, the types are part of the package."
    settings = read_settings(ROOT)
    (command,) = settings["console_scripts"].split()
    entry = EntryPoint(*command.split("="), group="console_scripts")
    assert (entry.name, entry.load()) == (PACKAGE, main)
    output = run_command([sys.executable, "-m", PACKAGE, "--version"], ROOT, ROOT)
    assert output.strip() == settings["version"] and (ROOT / PACKAGE / "py.typed").is_file()


@pytest.mark.slow
def test_wheel(project: Path):
    "The built wheel runs DESIGN's example in an empty environment, with the newest fastcore and without nbdev."
    folder = project.parent
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "wheel", project]
    run_command(build, project, project)
    (wheel,) = (folder / "wheel").glob("*.whl")
    lines = (project / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = "\n".join(line for line in lines if not line.startswith("fastcore=="))

    empty = folder / "empty"
    empty.mkdir()
    python = install(wheel, constraints, folder / "environment")
    run_command([python, project / "tests" / "integration" / "snippet.py", "--without-nbdev"], empty)
    assert "commands:" in run_command([python.parent / PACKAGE, "--help"], empty)
