"Import the libraries that notebooks and many tests use: `forks.fork_server` does it once, in the process that it forks."

import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

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


def parsed_now(corpus: ModuleType) -> Callable[[Path], Iterable[str]]:
    "Read the docstrings of the standard library, which half of the book does, and takes five seconds; read others later."
    read, known = corpus._read_docstrings, {}
    corpus._read_docstrings = lambda file: known.setdefault(file, list(read(file)))
    for _ in corpus.docstrings():
        pass
    return lambda file: known[file] if file in known else read(file)


with suppress(Exception):
    corpus = import_module("langmlm.text.corpus")
    corpus._read_docstrings = parsed_now(corpus)
for name in (*LIBRARIES, *LAUNCHERS, *MODULES):
    with suppress(Exception):  # What cannot be imported fails where it is used, which is reported
        import_module(name)
gc.collect()
gc.freeze()  # Collections in forks pass over what is here, and do not copy it
