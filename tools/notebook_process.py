"""Run notebooks in forks of this process, which has imported the libraries: alone, a notebook needs five seconds for it.

Reads requests from standard input, one line of JSON for each: `path` of the notebook, `log` for what it prints, and
`flags` of cells to skip. Answers with two lines: the id of the fork, and its exit status when it has ended.
"""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

LIBRARIES = ("datasets", "matplotlib.pyplot", "transformers", "langmlm.tasks")


def run(path: str, log: str, flags: list[str]) -> None:
    "Run the cells of a notebook as `nbdev_test` does; the exit status says whether all of them ran."
    from nbdev.test import test_nb

    for stream, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(log if stream else os.devnull, mode), stream)
    os.dup2(1, 2)
    passed, _ = test_nb(Path(path), skip_flags=flags)
    sys.exit(0 if passed else 1)


def main() -> None:
    "Import the libraries and serve requests until standard input ends."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints is no answer
    for name in ("nbdev.test", *LIBRARIES):
        with suppress(Exception):  # What cannot be imported fails in the notebook, where it is reported
            import_module(name)
    for line in sys.stdin:
        fork = os.fork()
        with suppress(PermissionError, ProcessLookupError):  # On both sides, so that it holds for whoever goes on first
            os.setpgid(fork, fork)
        if fork == 0:
            run(**json.loads(line))
        print(fork, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
