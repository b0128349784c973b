"""Run every check in a fresh copy of the project, two at a time; the last line is `N passed, N failed`.

Arguments go to pytest. A first argument that is no option selects checks by name:

    python tools/checks.py 03_masking
    python tools/checks.py "book and not notebook" -x
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from sandbox import copy_project, environment

WORKERS = 2
MEMORY = Path("/dev/shm")  # A folder in memory, on Linux
SCRATCH, SPARE = 4e9, 8e9  # Bytes that the checks may write, and that must be left for what they compute


def scratch_parent() -> str | None:
    "A folder in memory for what the checks write, if there is room: they call `fsync` thousands of times."
    try:
        is_executable = not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # For the code that `torch.compile` compiles
        has_room = shutil.disk_usage(MEMORY).free > SCRATCH and psutil.virtual_memory().available > SCRATCH + SPARE
    except OSError:
        return None
    return str(MEMORY) if is_executable and has_room and os.access(MEMORY, os.W_OK) else None


def main() -> int:
    "Copy the project and run pytest there; what runs cannot change the project, and edits cannot disturb what runs."
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["-k", *words]
    # The next check goes to the worker that is free: the long ones come first (see tests/conftest.py)
    options = ["-p", "no:cacheprovider", "--dist", "loadgroup", "--no-loadscope-reorder"]
    options += ["--durations", "10", "-o", "tmp_path_retention_policy=failed"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="langmlm-", dir=scratch_parent(), ignore_cleanup_errors=True) as folder:
        project, scratch = copy_project(Path(os.path.realpath(folder)) / "project"), Path(folder) / "tmp"
        scratch.mkdir()
        variables = environment(project) | {"TMPDIR": str(scratch), "HF_HOME": str(scratch / "hub")}
        command = [sys.executable, project / "tools" / "forks.py", str(WORKERS), *options, *words]
        return subprocess.run(command, cwd=project, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
