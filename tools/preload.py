"Import the libraries that notebooks and many tests use: `sandbox.fork_server` does it once, in the process that it forks."

from contextlib import suppress
from importlib import import_module

for name in ("nbdev.test", "datasets", "matplotlib.pyplot", "transformers", "langmlm.tasks"):
    with suppress(Exception):  # What cannot be imported fails where it is used, which is reported
        import_module(name)
