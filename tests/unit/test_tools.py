"The checks in tools/ find the problems that they are for, and let sound notebooks and modules pass."

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from unittest import mock

import empty_environment
import packaging
import pytest
import forks
import sandbox
from book import (
    Cell,
    Notebook,
    demonstration_problems,
    notebook_paths,
    output_problems,
    public_names,
    read_notebook,
    shape_problems,
    sidebar_links,
    sidebar_problems,
    used_names,
)
from language import find_phrases, language_problems
from links import anchors, link_problems
from package import (
    Size,
    budget_problems,
    file_problems,
    import_graph,
    imported_libraries,
    layer_problems,
    longest_chain,
    measure_package,
    pin_problems,
    read_package,
    requirement_problems,
)
from readme import without_figures
from forks import run_notebook
from sandbox import ROOT, changes, copy_project, run_command, snapshot

from langmlm.text.corpus import docstrings

TITLE = Cell("markdown", "# Corpus\n\n> Documents.", [])
PIXEL = "iVBORw0KGgo="


def code(source: str, *outputs: dict) -> Cell:
    "A code cell."
    return Cell("code", source, list(outputs))


def notebook(*cells: Cell, path: str = "03_corpus.ipynb") -> Notebook:
    "A notebook that was never on disk."
    return Notebook(Path(path), [TITLE, *cells])


def write_notebook(path: Path, *cells: tuple[str, str]) -> Path:
    "Store a notebook of `(kind, source)` cells."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [
        {"cell_type": kind, "source": source, "metadata": {}, "id": str(n)} for n, (kind, source) in enumerate(cells)
    ]
    for cell in made:
        cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


# Imports


def problems_of(**sources: str) -> list[str]:
    "What the checks of imports say of some modules; `text_files` stands for `text.files`."
    sources = {name.replace("_", ".", 1): source for name, source in sources.items()}
    graph, problems = import_graph(sources, "langmlm")
    return problems + layer_problems(graph) + file_problems(graph)


@pytest.mark.parametrize(
    "source",
    [
        "from langmlm.model.roberta import build_model",
        "from ..model.roberta import build_model",
        "from langmlm.model import roberta",
        "from ..model import roberta",
        "import langmlm.model.roberta",
        "import langmlm.model.roberta as roberta",
        "def late():\n    from ..model.roberta import build_model",
    ],
)
def test_imports_from_a_higher_layer_are_found(source):
    problems = problems_of(text_corpus=source, model_roberta="import torch")
    assert problems == ["text.corpus imports model.roberta, which is in a higher layer"]


def test_sound_imports_pass():
    corpus = "import torch, model\nfrom langmlm import __version__\nfrom ..disk import read_json\nfrom .files import find_files"
    assert problems_of(disk="", text_files="from ..config import ConfigError", config="", text_corpus=corpus) == []
    assert (
        problems_of(tasks="from .train.loop import train", train_loop="from ..tokens import encode", tokens_encode="")
        == []
    )


def test_relative_levels_are_counted():
    "One dot is the own folder, two are the package."
    assert problems_of(text_corpus="from .disk import read_json", disk="") == [
        "text.corpus imports text.disk, which is no module"
    ]
    assert problems_of(tasks="from .disk import read_json", disk="") == []
    assert problems_of(tasks="from . import disk, missing", disk="") == ["tasks imports missing, which is no module"]


def test_private_names_and_stars_are_found():
    sources = {"text_files": "", "text_corpus": "from .files import _open, find_files\nfrom .files import *"}
    assert problems_of(**sources) == [
        "text.corpus imports * from text.files",
        "text.corpus uses the private name _open of text.files",
    ]


def test_private_attributes_are_found():
    source = "from . import files\nimport langmlm.text.files as again\nfiles._open, again._close, files.find, self._own"
    assert problems_of(text_files="", text_corpus=source) == [
        "text.corpus uses the private name _close of text.files",
        "text.corpus uses the private name _open of text.files",
    ]


def test_a_module_without_a_layer_is_found():
    assert problems_of(leftover="") == ["leftover is in no layer"]


@pytest.mark.parametrize("reader", ["disk", "text.files", "tokens.shards", "data.dataset"])
def test_the_model_reaches_no_files(reader):
    "Not even through another module, and neither do batching and masking."
    sources = {reader: "", "data.loader": f"import langmlm.{reader}", "model.roberta": "from ..data.loader import load"}
    sources |= {"data.batching": f"from langmlm import {reader}" if reader == "disk" else f"import langmlm.{reader}"}
    assert file_problems(import_graph(sources, "langmlm")[0]) == [
        f"model.roberta reaches {reader}, which reads files",
        f"data.batching reaches {reader}, which reads files",
    ]
    assert file_problems({"model.roberta": set(), "data.masking": set(), "disk": set()}) == []


def test_the_longest_chain_of_imports():
    sources = {"a": "from . import b, c", "b": "from .c import x", "c": "", "d": "from . import c"}
    assert longest_chain(import_graph(sources, "langmlm")[0]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="imports itself through others"):
        longest_chain(import_graph(sources | {"c": "from . import a"}, "langmlm")[0])


def test_modules_are_named_by_their_folders(tmp_path: Path):
    for name in ("__init__", "_modidx", "disk", "text/__init__", "text/files"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    assert read_package(tmp_path) == {"disk": "x = 1\n", "text.files": "x = 1\n"}


def test_budgets():
    sources = {
        "disk": "__all__ = ['logger', 'read', 'write']\n",
        "text.files": "from ..disk import read\n__all__ = ['find']",
    }
    size = measure_package(sources, import_graph(sources, "langmlm")[0])
    assert size == Size(2, 3, 3, ["text.files", "disk"])
    assert str(size).startswith(
        "2 modules, 3 exported lines, 3 public names, longest import chain 2: text.files > disk"
    )
    assert budget_problems(Size(43, 11_310, 135, ["a"] * 12)) == []
    assert budget_problems(Size(44, 11_311, 136, ["a"] * 13)) == [
        "44 modules, more than 43",
        "11,311 exported lines, more than 11,310",
        "136 public names, more than 135",
        "13 modules in the longest import chain, more than 12",
    ]


# Requirements


def test_undeclared_and_unused_requirements_are_found():
    sources = {
        "a": "import os, IPython, numpy.linalg\ndef late():\n    from yaml import safe_load\nfrom .b import c, langmlm"
    }
    libraries, owners = imported_libraries(sources, "langmlm"), {"yaml": ["PyYAML"], "numpy": ["numpy"]}
    assert libraries == {"numpy", "yaml"}
    assert requirement_problems(libraries, "numpy>=2 pyyaml", owners) == []
    assert requirement_problems(libraries, "numpy>=2 torch>=2.11", owners) == [
        "yaml is imported, but settings.ini does not declare it",
        "settings.ini declares torch, but nothing imports it",
    ]


def test_constraints_pin_what_is_required():
    assert pin_problems("numpy>=2 Pillow", "# pins\nnumpy==2.4.6\npillow==12.0\n") == []
    assert pin_problems("numpy>=3 torch", "numpy==2.4.6\n") == [
        "constraints.txt pins numpy==2.4.6, but settings.ini wants numpy>=3",
        "constraints.txt does not pin torch",
    ]


# The environment of the wheel


class Package(Distribution):
    "A distribution that is not installed."

    def __init__(self, *requirements: str, version: str = "1.0"):
        lines = ["Name: some", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requirements)]
        self.text = "\n".join(lines)

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path):
        raise NotImplementedError


def test_what_a_wheel_needs_is_found(monkeypatch: pytest.MonkeyPatch):
    "Directly or not, with the extras that are asked for, and without those of the wheel."
    installed = {"b": Package("C[fast]>=1", "e; python_version < '3'"), "c": Package("d; extra == 'fast'", "b")}
    installed |= {name: Package() for name in "defg"}

    def find(name: str) -> Package:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(empty_environment, "distribution", find)
    assert sorted(empty_environment.needed(Package("B", "missing", "f; extra == 'dev'"))) == ["b", "c", "d"]


def test_only_pinned_versions_are_linked(tmp_path: Path):
    "pip would replace others, and with them what they link to."
    installed = {"a": Package(version="2.0+cpu"), "b": Package(version="2.1"), "c": Package(version="1.0")}
    assert list(empty_environment.pinned(installed, "# pins\na==2.0\nB==2.0\n")) == ["a"]
    empty_environment.link({"packaging": distribution("packaging")}, tmp_path)
    links = {path.name: path.resolve() for path in tmp_path.iterdir()}
    assert links["packaging"] == Path(packaging.__file__).parent and len(links) == 2  # And what describes it


# Notebooks


def test_a_name_needs_a_demonstration_that_uses_it():
    exported = code("#| export\ndef count(): pass\ndef read(): return count()\nLIMIT = 3")
    shown = code("from langmlm.text.corpus import LIMIT\ncount()  # read")
    module = "__all__ = ['logger', 'LIMIT', 'count', 'read']"
    missing = demonstration_problems(notebook(exported, shown), module)
    assert missing == ["LIMIT has no demonstration", "read has no demonstration"]
    assert demonstration_problems(notebook(exported, code("%time count()\nread(), corpus.LIMIT\ncount")), module) == []


def test_what_a_demonstrated_function_returns_is_demonstrated():
    exported = code("#| export\nclass Batch: pass\ndef load() -> Batch | None: pass")
    module = "__all__ = ['Batch', 'load']\ndef load() -> Batch | None: pass"
    assert demonstration_problems(notebook(exported, code("load()")), module) == []
    assert len(demonstration_problems(notebook(exported), module)) == 2


def test_names():
    assert public_names("import os\n__all__ = ['one',\n 'logger', 'two']") == ["one", "two"]
    assert used_names(code("%matplotlib inline\nvalue.attribute").tree) == {"value", "attribute"}


def test_directives_end_with_the_first_line_of_code():
    cell = code("#| exports\n#| eval: false\nvalue = 1\n#| hide")
    assert cell.directives == {"exports": "", "eval": "false"} and cell.is_exported and cell.lines == 2


def test_long_notebooks_are_found():
    assert shape_problems(notebook(*[code("1")] * 59)) == []
    assert shape_problems(notebook(*[code("1")] * 60)) == ["61 cells, more than 60"]
    assert shape_problems(notebook(*[code("#| export\n" + "a = 1\n" * 42)] * 10)) == []
    assert shape_problems(notebook(*[code("#| export\n" + "a = 1\n" * 43)] * 10)) == [
        "430 exported lines, more than 420"
    ]


def test_long_exported_cells_are_found():
    assert shape_problems(notebook(code("#| export\n" + "a = 1\n" * 45), code("a = 1\n" * 99))) == []
    assert shape_problems(notebook(code("#| export\n#| hide\n" + "a = 1\n" * 46))) == [
        "cell 1 exports 46 lines, more than 45"
    ]
    assert shape_problems(notebook(code("#| export\n" + "import os\n" * 60))) == []


@pytest.mark.parametrize("title", ["# Corpus", "Corpus\n> Documents.", "# Corpus\n> Documents.\n\nThis would be lost."])
def test_a_title_cell_holds_the_title_only(title):
    assert shape_problems(Notebook(Path("a.ipynb"), [Cell("markdown", title, [])]))


@pytest.mark.parametrize("source", ["import os\nos.sep", "def late():\n    import os", "#| hide\nimport os\nx = 1"])
def test_imports_stand_alone_in_demonstrations(source):
    assert shape_problems(notebook(code(source))) == ["cell 1 imports and does something else too"]
    assert shape_problems(notebook(code(f"#| export\n{source}"), code(f"#| eval: false\n{source}"))) == []
    assert shape_problems(notebook(code("%matplotlib inline\nimport os\nfrom os import path"))) == []


def test_one_cell_exports_imports():
    late = code("#| export\ndef late():\n    import os")
    first, second = code("#| export\nimport os\nlogger = None"), code("#| exporti\nimport re")
    assert shape_problems(notebook(first, late, code("import re"))) == []
    assert shape_problems(notebook(first, late, second)) == ["cells 1, 3 export imports; one cell should hold them all"]


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "error", "ename": "ValueError"},
        {"output_type": "stream", "text": ["in /home/someone/project"]},
        {"output_type": "execute_result", "data": {"text/plain": "PosixPath('/tmp/abc')"}},
    ],
)
def test_stored_errors_and_machine_paths_are_found(output):
    assert len(output_problems(notebook(code("1", output)))) == 1


def test_sound_outputs_pass():
    output = {"output_type": "stream", "text": ["3 of 4 lines in data/home/text.txt"]}
    assert output_problems(notebook(code("1", output))) == []


def test_notebooks_are_found_in_order(tmp_path: Path):
    names = ["index", "tasks", "data/2_masking", "data/10_loader", "text/01_files", "tutorials/first"]
    for name in (*names[::-1], ".checkpoints/10_first", "_draft"):
        write_notebook(tmp_path / f"{name}.ipynb", ("code", "#| default_exp text.files"))
    assert [path.relative_to(tmp_path).as_posix() for path in notebook_paths(tmp_path)] == [
        f"{name}.ipynb" for name in names
    ]
    assert read_notebook(tmp_path / "index.ipynb").module == "text.files"


def test_the_sidebar_has_every_notebook_once():
    contents = [{"text": "Welcome", "href": "index.ipynb"}, {"section": "Text", "contents": ["text/01_files.ipynb"]}]
    contents += [{"section": "Tasks", "href": "tasks.ipynb", "contents": []}]
    names = ["index.ipynb", "text/01_files.ipynb", "tasks.ipynb"]
    assert sidebar_links(contents) == names and sidebar_problems(names, names[::-1]) == []
    assert sidebar_problems(names, [*names[:2], names[0], "gone.ipynb"]) == [
        "the sidebar lacks tasks.ipynb",
        "the sidebar links to gone.ipynb, which is no notebook",
        "the sidebar lists index.ipynb twice",
    ]


# Language and links


@pytest.mark.parametrize(
    "text",
    [
        "Gradients of the way back.",
        "the WAY\nback",
        "def find_faults(config):",
        "The run goes on with step 3.",
        "# nobody\n# asks",
        "What comes in is text.",
        "a stand-in is drawn",
        "when the loss runs away",
        "a blank and a letter",
        "packed files are read",
        "The loss is no number.",
        "def take_step(run):",
        "rejected at the door",
    ],
)
def test_phrases_are_found(text):
    assert len(find_phrases(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "By default, a segmentation fault ends it; enable faulthandler.",
        "There is no number of steps to give.",
        "Leave a blank line. Fill in the blanks.",
        "the backward pass, resumed with step 3, packs sequences",
        "The gateway back-end runs daily.",
    ],
)
def test_plain_language_passes(text):
    assert find_phrases(text) == []


def test_phrases_are_found_in_notebooks_and_files(tmp_path: Path):
    write_notebook(tmp_path / "nbs" / "index.ipynb", ("markdown", "# Fine"), ("code", "raise ValueError('a fault')"))
    for name in ("README.md", "data.json", "langmlm/disk.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("by heart")
    found = language_problems(tmp_path, ["README.md", "data.json", "langmlm/disk.py"])
    assert [problem.split(" (say")[0] for problem in found] == [
        "nbs/index.ipynb, cell 1: 'fault'",
        "README.md: 'by heart'",
    ]


def test_links_that_lead_nowhere_are_found(tmp_path: Path):
    text = "# Home\n## The `run` folder, v1.5\n[1](text/01_files.ipynb#read-bytes) [2](#the-run-folder-v1.5) `[a](b)`\n"
    text += (
        "[3](gone.ipynb) [`4`](text/01_files.ipynb#gone) ![5](images/plot.png) [6](https://x.org/#y)\n```\n[b](c)\n```"
    )
    write_notebook(tmp_path / "nbs" / "index.ipynb", ("markdown", text), ("code", "'[c](d)'"))
    write_notebook(
        tmp_path / "nbs" / "text" / "01_files.ipynb", ("markdown", "## Read bytes\n[up](../../README.md#top)")
    )
    (tmp_path / "README.md").write_text("# Top\n[down](nbs/text/01_files.ipynb) [none](text/01_files.ipynb)")
    assert link_problems(tmp_path, ["README.md"]) == [
        "nbs/index.ipynb links to gone.ipynb, but there is no such file",
        "nbs/index.ipynb links to text/01_files.ipynb#gone, but there is no such heading",
        "nbs/index.ipynb links to images/plot.png, but there is no such file",
        "README.md links to text/01_files.ipynb, but there is no such file",
    ]


def test_anchors():
    assert anchors("# A. b-c (d)\n#no\n### E {#own .x}\n```\n# code\n```\n[]{#here}") == {
        "a.-b-c-d",
        "a-b-c-d",
        "e",
        "own",
        "here",
    }


# README


def test_figures_become_files_with_alt_text():
    picture = {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Figure>"}}
    value = {"output_type": "execute_result", "data": {"text/plain": "1"}, "execution_count": None}
    cells = [
        {"cell_type": "raw", "source": "---"},
        {"cell_type": "code", "source": '#| fig-alt: "Loss by step"\nplot()', "outputs": [value, picture]},
    ]
    made, figures = without_figures({"cells": cells})
    assert [cell["source"] for cell in made["cells"]] == ["plot()", "![Loss by step](images/readme-1.png)"]
    assert made["cells"][0]["outputs"] == [value | {"execution_count": 1}]
    assert list(figures) == ["readme-1.png"] and figures["readme-1.png"].startswith(b"\x89PNG")


# Sandbox


def test_a_copy_has_the_files_of_the_project(tmp_path: Path):
    copied = snapshot(copy_project(tmp_path / "project"))
    assert copied["pytest.ini"] == (ROOT / "pytest.ini").read_bytes() and "langmlm/disk.py" in copied
    assert not any("__pycache__" in name or name.startswith((".git/", ".venv/")) for name in copied)


def test_changes_are_found(tmp_path: Path):
    for name in ("same", "gone", "other"):
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    (tmp_path / "gone").rename(tmp_path / "new")
    (tmp_path / "other").write_text("changed")
    assert changes(before, snapshot(tmp_path)) == ["new is new", "gone is gone", "other changed"]


def test_commands_that_fail_or_hang_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "And what a command that hangs has started ends with it."
    assert run_command([sys.executable, "-c", "print(1)"], tmp_path) == "1\n"
    with pytest.raises(AssertionError, match="exit status 3\nfirst 2$"):
        run_command([sys.executable, "-c", "print('first 1', end='\\r'); print('first 2'); exit(3)"], tmp_path)
    monkeypatch.setattr(sandbox, "TIME_LIMIT", 3)
    started = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    )
    with pytest.raises(AssertionError, match="no end after 3 s") as error:
        run_command([sys.executable, "-c", started], tmp_path)
    wait_until_gone(int(str(error.value).split()[-1]))


def wait_until_gone(pid: int) -> None:
    "Wait for the end of a process that is not our child."
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    "Whether a process runs; one that ended and is not reaped yet does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def report_modules(path: Path) -> None:
    "Write what a new process has imported and what it sees of the machine."
    found = {name: name in sys.modules for name in ("langmlm.tasks", "nbdev.test", "matplotlib.pyplot")}
    with mock.patch("ast.parse", side_effect=InterruptedError):
        found["docstrings"] = len(list(docstrings()))
    path.write_text(json.dumps(found | {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}))


def test_forks_have_imported_the_libraries(tmp_path: Path):
    process = forks.fork_server().Process(target=report_modules, args=(tmp_path / "found",))
    process.start()
    process.join()
    found = json.loads((tmp_path / "found").read_text())
    assert found.pop("docstrings") > 1_000  # Nothing was parsed
    assert found == {"langmlm.tasks": True, "nbdev.test": True, "matplotlib.pyplot": True, "gpu": ""}


ASK_FOR_SERVER = """
import os, forks

def write_parent(file):
    process = forks.fork_server().Process(target=os.system, args=(f"cat /proc/$PPID/stat > {file}",))
    process.start()
    process.join()
"""


def test_workers_share_the_server(tmp_path: Path):
    "A process that is told of the server of another one starts its forks there, and uses its commands."
    program = ASK_FOR_SERVER + f"write_parent({str(tmp_path / 'theirs')!r})\nprint(forks.forked_python())"
    variables = os.environ | {forks.SHARED: json.dumps(forks.facts_to_share()), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [forks.forked_python(), "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    exec(ASK_FOR_SERVER + f"write_parent({str(tmp_path / 'ours')!r})", {})
    theirs, ours = ((tmp_path / name).read_text().rsplit(")", 1)[1].split()[1] for name in ("theirs", "ours"))
    assert theirs == ours and done.stdout.strip() == forks.forked_python()
    with mock.patch.dict(os.environ, {forks.SHARED: json.dumps({"project": "another copy"})}):
        assert forks.shared_server() is None


SCRIPT = """
import atexit, os, sys, threading
atexit.register(print, "at exit")
threading.Thread(target=lambda: (threading.Event().wait(0.2), print("thread"))).start()
print(__name__, __file__, sys.path[0], sys.argv, os.getcwd(), os.environ["GREETING"], sys.stdin.read(), __import__("shown").NAME)
os.write(int(sys.argv[1]), b"through a file")
"""
PROGRAMS = {
    "script": ["script.py"],
    "module": ["-m", "shown"],
    "status": ["-c", "raise SystemExit(7)"],
    "message": ["-u", "-c", "raise SystemExit('no')"],
    "error": ["-c", "import sys; print(sys.argv); raise ValueError('wrong')"],
    "interrupt": ["-c", "raise KeyboardInterrupt('stop')"],
    "killed": ["-c", "import os; os.kill(os.getpid(), 9)"],
    "option": ["-O", "-c", "print(__debug__)"],
}


@pytest.mark.parametrize("words", PROGRAMS.values(), ids=PROGRAMS)
def test_forked_python_does_what_python_does(tmp_path: Path, words: list[str]):
    "Its arguments, input, environment, open files, output, and end."
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "shown.py").write_text("import sys\nNAME = __name__\nprint(NAME, sys.argv[1:])")
    results = []
    for python in (sys.executable, forks.forked_python()):
        with open(tmp_path / "file", "w") as file:
            number = os.dup2(file.fileno(), 77)
        variables = os.environ | {"GREETING": "hello"}
        options = {"cwd": tmp_path, "env": variables, "pass_fds": [number], "capture_output": True, "text": True}
        done = subprocess.run([python, *words, str(number)], input="input", **options)
        os.close(number)
        written = (tmp_path / "file").read_text()
        results.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:], written))
    assert results[0] == results[1] and any(results[0])


def test_forked_python_ends_with_its_command():
    "Signals reach it, and when the command is killed, it is, too."
    program = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'asked'))\n"
    program += "print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([forks.forked_python(), "-c", program], stdout=subprocess.PIPE, text=True) as command:
        process = int(command.stdout.readline())
        assert process != command.pid and is_running(process)
        command.terminate()
        assert command.stdout.read(5) == "asked"
        command.kill()
    assert command.returncode == -signal.SIGKILL
    wait_until_gone(process)


def test_variables_that_forks_cannot_change():
    "They lead to the real Python, and so does a program that asks what is imported."
    program = "import sys; print('langmlm.tasks' in getattr(sys, 'modules'))"
    for value, is_fork in (("1", "True"), ("0", "False")):
        command, variables = [forks.forked_python(), "-c", program], os.environ | {"HF_HUB_OFFLINE": value}
        assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout.strip() == is_fork
    command = [forks.forked_python(), "-c", "import sys; print('langmlm.tasks' in sys.modules)"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout.strip() == "False"


def test_commands_run_offline_on_one_thread():
    variables = sandbox.environment(Path("here"))
    assert (
        variables["OMP_NUM_THREADS"] == variables["HF_HUB_OFFLINE"] == "1" and variables["CUDA_VISIBLE_DEVICES"] == ""
    )
    assert variables["PYTHONPATH"] == "here" and "PYTHONPATH" not in sandbox.environment(None)


def test_notebooks_that_fail_are_found(tmp_path: Path):
    sound = write_notebook(
        tmp_path / "sound.ipynb", ("code", "x = 1"), ("code", "#| slow\nraise ValueError"), ("code", "x")
    )
    broken = write_notebook(
        tmp_path / "broken.ipynb", ("code", "print('before')"), ("code", "assert 1 == 2, 'not equal'")
    )
    run_notebook(sound, {"slow"})
    with pytest.raises(AssertionError, match="not equal"):
        run_notebook(broken, set())
    with pytest.raises(AssertionError, match="ValueError"):
        run_notebook(sound, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.ipynb", "sound.ipynb"]


def test_notebooks_that_hang_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "With what they started; if that takes longer than the limit, the limit is raised."
    source = "import os, subprocess, time\nprocess = subprocess.Popen(['sleep', '600'])\nopen('new', 'w').write(str(process.pid))"
    path = write_notebook(tmp_path / "hangs.ipynb", ("code", f"{source}\nos.rename('new', 'pid')\ntime.sleep(600)"))
    for limit in (2, 10, 50):
        monkeypatch.setattr(forks, "TIME_LIMIT", limit)
        with pytest.raises(AssertionError, match=f"no end after {limit} s"):
            run_notebook(path, set())
        if (tmp_path / "pid").exists():
            break
    wait_until_gone(int((tmp_path / "pid").read_text()))


# The count


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_the_last_line_counts(tmp_path: Path, options: list[str]):
    "Errors count as failures, skipped tests are shown with their reasons, and a test that hangs ends."
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "pytest.ini").write_text((ROOT / "pytest.ini").read_text(encoding="utf-8").replace("= 1800", "= 2"))
    source = """
        import pytest, time
        def test_one(record_property): record_property("summary", "12 modules")
        def test_two(): assert False
        def test_three(missing_fixture): pass
        def test_four(): pytest.skip("there is no GPU")
        @pytest.mark.slow
        def test_five(): pass
    """
    if options:  # In a process of its own, which is replaced
        source += "    def test_six(): time.sleep(60)\n"
    (tmp_path / "test_some.py").write_text("\n".join(line[8:] for line in source.splitlines()))
    command = [forks.forked_python(), "-m", "pytest", "-p", "no:cacheprovider", "-v", *options, tmp_path / "test_some.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[-1] == f"2 passed, {3 if options else 2} failed, 1 skipped"
    assert "12 modules" in lines and any("SKIPPED" in line and "there is no GPU" in line for line in lines)
    ran = [line for line in lines if "test_some.py::" in line and "PASSED" in line]
    assert options or "test_five" in ran[0]
