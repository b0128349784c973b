"""Run one notebook in a forked process.

Importing this module imports what every notebook needs. A process that is forked afterwards has it at once, which halves
the time of a test run: on its own, a notebook spends five seconds on imports.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from nbdev.test import test_nb

with suppress(Exception):  # A package that cannot be imported fails in the notebooks, where it is reported
    import datasets, matplotlib.pyplot, transformers  # noqa: E401, F401
    import langmlm.tasks  # noqa: F401


def run(path: Path, log: Path, flags: set[str]) -> None:
    "Run the cells of a notebook except those with one of `flags`; the exit status says whether all of them ran."
    os.setsid()  # So that it can be killed together with its children
    streams = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, source in ((0, streams[0]), (1, streams[1]), (2, streams[1])):
        os.dup2(source, stream)
    passed, _ = test_nb(path, skip_flags=flags)
    sys.exit(0 if passed else 1)
