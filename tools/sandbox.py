"Copies of the project to run commands and notebooks in, so that nothing they do changes the project itself."

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
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
