"""Run every check of the project: one line for each, and `N passed, N failed` at the end.

Each check works in a fresh copy of the project, so nothing that it runs can change the project itself.
Words on the command line select the checks whose name contains one of them.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml
from book import (
    chapters,
    import_faults,
    lesson_faults,
    notebook_paths,
    output_faults,
    read_book,
    shape_faults,
    sidebar_faults,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "langmlm"
WORKERS = 2
NOTEBOOK_TIMEOUT = 300  # Seconds, as all that follow
PYTEST_TIMEOUT = 900  # One test compiles a model
INSTALL_TIMEOUT = 900
TOOL_TIMEOUT = 300
SHOWN_LINES = 60  # Of the output of a command that failed


class Fault(Exception):
    "What a check found wrong, in words for the reader of the report."


@dataclass(frozen=True)
class Outcome:
    "One line of the report."

    name: str
    fault: str | None = None  # None when the check passed
    seconds: float = 0.0


Check = Callable[[Path], list[Outcome] | None]  # Takes its copy of the project; returns outcomes only if it has many


# Tools for checks


def demand_none(faults: list[str]) -> None:
    "Raise the faults, if there are any."
    if faults:
        raise Fault("\n".join(faults))


def run_command(command: list, folder: Path, timeout: int, with_project: bool = True) -> str:
    "Run a command to its end and return all it printed; a failure or a time-out is a fault, and ends its children."
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=environment(folder, with_project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode(errors="replace")
        raise Fault(f"took more than {timeout} s\n{last_lines(output)}") from None
    if process.returncode != 0:
        raise Fault(f"exit status {process.returncode}\n{last_lines(output)}")
    return output


def environment(folder: Path, with_project: bool) -> dict[str, str]:
    "Variables for a command: one thread, no GPU, no network for models, and all scratch files beside the copy."
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "IN_TEST")}
    variables |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hub"),
        "TMPDIR": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # What is checked holds on CPUs; `make gpu` has the rest
    }
    return variables | {"PYTHONPATH": str(folder)} if with_project else variables


def last_lines(output: str) -> str:
    "The end of what a command printed, progress bars as they stood last."
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.rstrip().split("\n")]
    return "\n".join(lines[-SHOWN_LINES:])


def tool(name: str) -> Path:
    "A command of the environment that runs the checks."
    return Path(sys.executable).parent / name


@contextmanager
def project_copy() -> Iterator[Path]:
    "A copy of all files that git tracks or would track, removed at the end."
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    with tempfile.TemporaryDirectory(prefix="langmlm-") as folder:
        root = Path(folder) / "project"
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        yield root


def snapshot(folder: Path) -> dict[str, bytes]:
    "The bytes of every file in a folder and below, by name."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    "How two snapshots differ, in words."
    faults = [f"{name} is new" for name in sorted(after.keys() - before.keys())]
    faults += [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
    return faults + [f"{name} changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]


# The checks


def check_export(root: Path) -> None:
    "The committed package is what the notebooks export."
    before = snapshot(root / PACKAGE)
    shutil.rmtree(root / PACKAGE, ignore_errors=True)
    run_command([tool("nbdev_export")], root, TOOL_TIMEOUT)
    demand_none(changes(before, snapshot(root / PACKAGE)))


def check_clean(root: Path) -> None:
    "Cleaning the notebooks changes nothing."
    before = snapshot(root / "nbs")
    output = run_command([tool("nbdev_clean")], root, TOOL_TIMEOUT)
    if "Failed to clean" in output:
        raise Fault(last_lines(output))
    demand_none(changes(before, snapshot(root / "nbs")))


def check_readme(root: Path) -> None:
    "README.md is what nbs/index.ipynb makes."
    run_command([sys.executable, "tools/readme.py"], root, TOOL_TIMEOUT)


def check_imports(root: Path) -> None:
    "Modules import only from earlier chapters."
    sources = {
        path.stem: path.read_text(encoding="utf-8")
        for path in (root / PACKAGE).glob("*.py")
        if not path.stem.startswith("_")
    }
    order = list(chapters(read_book(root / "nbs")))
    demand_none(import_faults(order, sources, PACKAGE) if order else ["no notebook exports a module"])


def check_lessons(root: Path) -> None:
    "Every public name is used in a lesson of its notebook."
    faults = []
    for module, notebook in chapters(read_book(root / "nbs")).items():
        source = (root / PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        faults += [f"{notebook.path.name}: {fault}" for fault in lesson_faults(notebook, source)]
    demand_none(faults)


def check_shape(root: Path) -> None:
    "Notebooks keep to their size and open with a title; what they store has no errors and no machine's paths."
    faults = []
    for notebook in read_book(root / "nbs"):
        faults += [f"{notebook.path.name}: {fault}" for fault in shape_faults(notebook) + output_faults(notebook)]
    demand_none(faults)


def check_docs(root: Path) -> None:
    "The documentation builds up to the point where Quarto takes over, and its sidebar has every notebook."
    output = run_command([sys.executable, "tools/prepare_docs.py"], root, TOOL_TIMEOUT)
    book = read_book(root / "nbs")
    unprocessed = [
        f"{notebook.path.name} was not processed"
        for notebook in book
        if not (root / "_proc" / notebook.path.relative_to(root / "nbs")).exists()
    ]
    mixed = [last_lines(output)] if "Found cells containing imports" in output else []
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    demand_none(unprocessed + mixed + sidebar_faults(book, root / "nbs", sidebar_links(site["sidebar"]["contents"])))


def sidebar_links(contents: list) -> list[str]:
    "All notebooks that a sidebar links to, from top to bottom."
    links = []
    for entry in contents:
        if isinstance(entry, str):
            links.append(entry)
        else:
            links += sidebar_links(entry["contents"]) if "contents" in entry else [entry["href"]]
    return links


def check_notebook(root: Path, name: str) -> None:
    "A notebook runs, and leaves nothing behind."
    before = snapshot(root)
    output = run_command([tool("nbdev_test"), "--path", root / name], root, NOTEBOOK_TIMEOUT)
    if "Success." not in output:
        raise Fault(last_lines(output))
    demand_none(changes(before, snapshot(root)))


def check_pytest(root: Path) -> list[Outcome]:
    "The tests in tests/, each with its own outcome."
    report = root.parent / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    fault = None
    try:
        run_command(command, root, PYTEST_TIMEOUT)
    except Fault as error:
        fault = str(error)
    outcomes = pytest_outcomes(report) if report.exists() else []
    if not outcomes or (fault and all(outcome.fault is None for outcome in outcomes)):
        raise Fault(fault or "no test was found")
    return outcomes


def pytest_outcomes(report: Path) -> list[Outcome]:
    "What a JUnit report says of each test; skipped tests are left out."
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [f"{found.get('message')}\n{found.text}" for found in case if found.tag in ("failure", "error")]
        if case.find("skipped") is None:
            name = f"pytest {case.get('classname')}.{case.get('name')}"
            outcomes.append(Outcome(name, "\n".join(faults) or None, float(case.get("time", 0))))
    return outcomes


def check_wheel(root: Path) -> None:
    "The built wheel runs DESIGN's snippet in an empty environment with the newest fastcore and without nbdev."
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", root.parent / "wheel", root]
    run_command(build, root, TOOL_TIMEOUT)
    (wheel,) = (root.parent / "wheel").glob("*.whl")
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = root.parent / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith("fastcore==")), encoding="utf-8")

    empty = root.parent / "empty"
    empty.mkdir()
    python = root.parent / "environment" / "bin" / "python"
    run_command([sys.executable, "-m", "venv", root.parent / "environment"], empty, TOOL_TIMEOUT, with_project=False)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel]
    run_command(install, empty, INSTALL_TIMEOUT, with_project=False)
    run_command([python, root / "tests" / "integration" / "snippet.py", "--without-nbdev"], empty, TOOL_TIMEOUT, with_project=False)


# The report


def all_checks() -> dict[str, Check]:
    "Every check by name, the longest first."
    notebooks = [path.relative_to(ROOT).as_posix() for path in notebook_paths(ROOT / "nbs")]
    return {
        "the wheel works without nbdev": check_wheel,
        "pytest": check_pytest,
        **{f"{name} runs": lambda root, name=name: check_notebook(root, name) for name in notebooks},
        "the documentation can be prepared": check_docs,
        "README.md is what the index notebook makes": check_readme,
        "the package is what the notebooks export": check_export,
        "the notebooks are clean": check_clean,
        "modules import only from earlier chapters": check_imports,
        "every public name has a lesson": check_lessons,
        "the notebooks keep their shape": check_shape,
    }


def attempt(name: str, check: Check) -> list[Outcome]:
    "Run one check in its own copy of the project; whatever it raises is its fault."
    started = time.monotonic()
    try:
        with project_copy() as root:
            outcomes = check(root)
        fault = None
    except Fault as error:
        outcomes, fault = None, str(error)
    except Exception:
        outcomes, fault = None, traceback.format_exc()
    return outcomes or [Outcome(name, fault, time.monotonic() - started)]


def show(outcome: Outcome) -> None:
    "Print one line, and below it what is wrong."
    print(f"{'FAIL' if outcome.fault else 'ok  '} {outcome.name} ({outcome.seconds:.0f} s)", flush=True)
    if outcome.fault:
        print("\n".join(f"     {line}" for line in outcome.fault.splitlines()), flush=True)


def main() -> int:
    "Run the selected checks, two at a time, and count."
    words = sys.argv[1:]
    selected = {name: check for name, check in all_checks().items() if not words or any(word in name for word in words)}
    passed = failed = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for future in as_completed([pool.submit(attempt, name, check) for name, check in selected.items()]):
            for outcome in future.result():
                show(outcome)
                passed, failed = passed + (outcome.fault is None), failed + (outcome.fault is not None)
    print(f"{passed} passed, {failed} failed", flush=True)
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
