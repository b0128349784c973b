"Copies of the project to run commands and notebooks in, so that nothing they do changes the project itself."

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 1_500  # Seconds; catches hangs only, and is below pytest's own limit so that children are killed, too
SHOWN_LINES = 60  # Of the output of a command that failed
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints"}


def files_below(folder: Path) -> list[str]:
    "Names of all files in a folder and below, without caches."
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not CACHES & set(path.parts))


def project_files(root: Path) -> Iterable[str]:
    "Names of the files that git tracks or would track; of all files where there is no git."
    if not (root / ".git").exists():
        return files_below(root)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.split("\0") if name and (root / name).is_file()]


def copy_project(target: Path) -> Path:
    "Copy the project into a new folder."
    for name in project_files(ROOT):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def environment(project: Path | None) -> dict[str, str]:
    "Variables for a command: one thread, no GPU, no model downloads; `project` is what it imports."
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "IN_TEST")}
    variables |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return variables | {"CUDA_VISIBLE_DEVICES": "", **({"PYTHONPATH": str(project)} if project else {})}


def run_command(command: list, folder: Path, project: Path | None = None) -> str:
    "Run a command to its end and return all it printed; raise AssertionError if it fails or hangs."
    __tracebackhide__ = True  # pytest then shows the message only
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=environment(project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=TIME_LIMIT)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode(errors="replace")
        raise AssertionError(f"no end after {TIME_LIMIT} s\n{last_lines(output)}") from None
    assert process.returncode == 0, f"exit status {process.returncode}\n{last_lines(output)}"
    return output


@cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of processes that are forks of one process, which has imported the libraries and does nothing else.

    `fork_server().Process(target=..., args=...)` starts in no time; a new process needs seven seconds for its imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.preload"])
    before = dict(os.environ)
    os.environ.clear()  # The server has the environment of its start
    os.environ.update(environment(ROOT))
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_cells(path: Path, log: Path, flags: set[str]) -> None:
    "Run the cells of a notebook as `nbdev_test` does; the exit status says whether all of them ran."
    os.setpgid(0, 0)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=sorted(flags))
    sys.exit(0 if passed else 1)


def run_notebook(path: Path, flags: set[str]) -> None:
    "Run a notebook in a process of its own; raise AssertionError if it fails or hangs."
    __tracebackhide__ = True
    log = path.with_suffix(".log")
    process = fork_server().Process(target=run_cells, args=(path, log, flags))
    process.start()
    process.join(TIME_LIMIT)
    status = process.exitcode
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # The notebook if it hangs, and what it left running
    process.kill()
    process.join()
    output = last_lines(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else ""
    log.unlink(missing_ok=True)
    assert status is not None, f"no end after {TIME_LIMIT} s\n{output}"
    assert status == 0, f"exit status {status}\n{output}"


def last_lines(output: str) -> str:
    "The end of what a command printed; of a progress bar, its last state."
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.rstrip().split("\n")]
    return "\n".join(lines[-SHOWN_LINES:])


def tool(name: str) -> Path:
    "A command of the environment that runs the checks."
    return Path(sys.executable).parent / name


def demand_none(problems: list[str]) -> None:
    "Raise AssertionError with all problems, one per line, if there are any."
    __tracebackhide__ = True
    if problems:
        raise AssertionError("\n".join(problems))


def snapshot(folder: Path) -> dict[str, bytes]:
    "The content of every file in a folder and below, by name."
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    "How two snapshots differ, in words."
    found = [f"{name} is new" for name in sorted(after.keys() - before.keys())]
    found += [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
    return found + [f"{name} changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
