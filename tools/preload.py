"Import the libraries that notebooks and many tests use: `forks.fork_server` does it once, in the process that it forks."

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from importlib import import_module

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


def parsed_once(docstrings: Callable) -> Callable:
    "The docstrings of the standard library, which half of the book reads and which take five seconds, as they were here."
    documents = list(docstrings())

    def read(packages: Iterable[str] = ()) -> Iterator[str]:
        return docstrings(packages) if packages else iter(documents)

    return wraps(docstrings)(read)


with suppress(Exception):
    corpus = import_module("langmlm.text.corpus")
    corpus.docstrings = parsed_once(corpus.docstrings)  # Before other modules import it
for name in (*LIBRARIES, *LAUNCHERS, *MODULES):
    with suppress(Exception):  # What cannot be imported fails where it is used, which is reported
        import_module(name)
