"""One process of a launch that fails, or is killed, at a chosen point; run as a script with a job in JSON.

    {"data": files, "config": options, "tokenizer": folder or null, "fail": point or null, "rank": who fails, "kill": bool}
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from langmlm import tasks
from langmlm.tokens import processes, shards, tokenizer


def fail(function: Callable, kill: bool) -> Callable:
    "Make a function fail when it is called."

    def failing(*given, **options):
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, f"No space left, says {function.__name__}")

    return failing


POINTS = {  # Module and name of the function that fails
    "training": (tokenizer, "train_tokenizer"),
    "duplicates": (shards, "mark_duplicates"),
    "shard": (shards, "_write_shard"),
    "saving": (shards, "_save_dataset"),
    "naming": (tokenizer, "atomic_folder"),
}


def main(job: dict) -> None:
    "Do a job in this process."
    logging.basicConfig(level=logging.WARNING)
    processes.PROCESS_TIMEOUT, processes._HEARTBEAT = job.get("timeout", 300), 0.2
    tasks.write_dataset = partial(shards.write_dataset, shard_characters=50_000)
    if job["fail"] and int(os.environ.get("RANK", 0)) == job["rank"]:
        module, name = POINTS[job["fail"]]
        setattr(module, name, fail(getattr(module, name), job["kill"]))
    tasks.create_tokenizer(job["data"], job["config"], tokenizer=job["tokenizer"]).train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
