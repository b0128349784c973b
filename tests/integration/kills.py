"Kill a tokenizing process at random moments until it finishes."

import random
import shutil
import time
from pathlib import Path

from forks import fork_server

from langmlm.text.corpus import open_corpus
from langmlm.tokens.shards import write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig, load_tokenizer


def make_dataset(text: str, tokenizer: str, shard_characters: int, config: dict, ready=None) -> None:
    "Tokenize a text, and set an event when the work begins."
    corpus, loaded = open_corpus(text), load_tokenizer(tokenizer)
    if ready is not None:
        ready.set()
    write_dataset(corpus, loaded, TokenizerConfig(**config), shard_characters)


def contents(folder: Path) -> dict[str, bytes]:
    "Read all files below a folder, by name."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempt(job: tuple, kill_after: float | None = None) -> float | None:
    "Run a job in a process, killed after some seconds if given; return the seconds it took, or None if it was killed."
    server = fork_server()  # Has imported everything, and forks a process for each attempt
    ready = server.Event()
    process = server.Process(target=make_dataset, args=(*job, ready))
    process.start()
    ready.wait()
    began = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    assert process.exitcode == 0, f"the process exited with {process.exitcode}"
    return time.monotonic() - began


def kill_often(job: tuple, target: Path, kills: int, seed: int) -> dict:
    "Kill a job at random moments, resume it each time, and compare its result with that of an undisturbed job."
    seconds, draw, shards = attempt(job), random.Random(seed), []
    whole = contents(target)
    shutil.rmtree(target)
    while len(shards) < kills:
        if attempt(job, draw.uniform(0, seconds)) is None:
            shards.append(len(list(target.parent.glob(f".{target.name}.*.unfinished/shard-*/manifest.json"))))
        else:  # It finished before the kill: start again
            assert contents(target) == whole
            shutil.rmtree(target)
    attempt(job)
    return {"seconds": seconds, "finished_shards": shards, "equal": contents(target) == whole}
