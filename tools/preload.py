"Import the libraries that notebooks and many tests use: `forks.fork_server` does it once, in the process that it forks."

from contextlib import suppress
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

for name in (*LIBRARIES, *LAUNCHERS, "langmlm.tasks", "langmlm.cli", "langmlm.testing", "langmlm.probe"):
    with suppress(Exception):  # What cannot be imported fails where it is used, which is reported
        import_module(name)
