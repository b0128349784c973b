"Import the libraries that notebooks and many tests use: `forks.fork_server` does it once, in the process that it forks."

import gc
import os
import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = (
    "datasets",
    "matplotlib.pyplot",
    "transformers",
    "sklearn.linear_model",
    "transformers.pipelines",
    "torch.profiler._cupti_monitor",
    "nbdev.test",
    "nbdev.processors",
)
LAUNCHERS = ("torch.distributed.run", "torch.distributed.elastic.agent.server.local_elastic_agent")
LAUNCHERS += ("accelerate.commands.accelerate_cli",)

MODULES = ("langmlm.tasks", "langmlm.cli", "langmlm.testing", "langmlm.probe")


def docstrings_by_file(corpus: ModuleType) -> dict[Path, list[str]]:
    "Read the docstrings of the standard library."
    read, known = corpus._read_docstrings, {}
    corpus._read_docstrings = lambda file: known.setdefault(file, list(read(file)))
    for _ in corpus.docstrings():
        pass
    return known


def in_a_fork(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    "Call a function in another process; return a function that waits for its result."
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with open(sender, "wb") as stream:
                pickle.dump(function(*arguments), stream)
        finally:
            os._exit(0)
    os.close(sender)

    def wait() -> Any:
        with open(receiver, "rb") as stream:
            result = pickle.load(stream)
        os.waitpid(child, 0)
        return result

    return wait


def known_first(read: Callable[[Path], Iterable[str]], known: dict[Path, list[str]]) -> Callable[[Path], Iterable[str]]:
    "Read the docstrings of a file, unless they are known."
    return lambda file: known[file] if file in known else read(file)


corpus = parsed = None
with suppress(Exception):
    corpus = import_module("langmlm.text.corpus")
    parsed = in_a_fork(docstrings_by_file, corpus)  # Half of the book reads them; it takes as long as the imports below
for name in (*LIBRARIES, *LAUNCHERS, *MODULES):
    with suppress(Exception):  # What cannot be imported fails where it is used, which is reported
        import_module(name)
with suppress(Exception):
    corpus._read_docstrings = known_first(corpus._read_docstrings, parsed())
gc.collect()
gc.freeze()  # Collections in forks pass over what is here, and do not copy it
