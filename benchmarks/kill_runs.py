"""Kill training runs at random moments, resume each, and compare its weights with those of an uninterrupted run.

    python benchmarks/kill_runs.py --kills 100 --write

Half of the kills happen at any moment of a run, half while a checkpoint is being saved. One process imports the libraries
and is forked for each run; it computes nothing itself, so every run starts in a fresh state. `--write` stores the results
in `benchmarks/results/kill_runs.json`, which the tutorial on resuming shows.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import transformers

from langmlm import tasks
from langmlm.train.checkpoint import list_checkpoints
from langmlm.text.corpus import docstrings
from langmlm.disk import LOCK

RESULT = Path(__file__).parent / "results" / "kill_runs.json"
ARCHITECTURE = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
SETTINGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 2e-3,
    "logging_steps": 3,
    "save_steps": 2,
    "save_total_limit": 2,
    "bf16": False,
    "disable_tqdm": True,
}
DATA = {"tokenizer": "tokenizer", "tokenized_dataset": "dataset"}


def prepare() -> None:
    "Create a tokenizer and a dataset in the current folder."
    Path("data.txt").write_text("\n".join(islice(docstrings(), 300)), encoding="utf-8")
    folders = {"path_to_save_tokenizer": DATA["tokenizer"], "path_to_save_dataset": DATA["tokenized_dataset"]}
    tasks.create_tokenizer("data.txt", {"vocab_size": 500, "max_length": 32, **folders}).train()


def train(folder: Path) -> None:
    "Resume the run in a folder; start it again if it has no checkpoint yet."
    if list_checkpoints(folder):
        tasks.create_mlm(**DATA, checkpoint_path=folder, resume="full").train()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        tasks.create_mlm(**DATA, model_config=ARCHITECTURE, training_config={**SETTINGS, "output_dir": folder}).train()


def fork(action: Callable[[], None]) -> int:
    "Run an action in a forked process, with its output in `log.txt`; return the process id."
    if child := os.fork():
        return child
    status = 1
    try:
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(action: Callable[[], None]) -> None:
    "Run an action in a process of its own, and wait for it."
    _, status = os.waitpid(fork(action), 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}:\n{Path('log.txt').read_text()[-3000:]}")


def in_a_save(folder: Path) -> bool:
    "Return whether a checkpoint is being written, replaced or deleted in a run folder."
    return any(path.suffix in (".partial", ".replaced", ".outdated") for path in folder.glob(".checkpoint-*"))


def watch(folder: Path) -> tuple[float, float]:
    "Train to the end; return the seconds it took, and the seconds of its saves."
    child, began, looks, saving = fork(lambda: train(folder)), time.monotonic(), 0, 0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        looks, saving = looks + 1, saving + in_a_save(folder)
        time.sleep(0.0002)
    if ended[1]:
        raise RuntimeError(
            f"the uninterrupted run ended with status {ended[1]}:\n{Path('log.txt').read_text()[-3000:]}"
        )
    seconds = time.monotonic() - began
    return seconds, seconds * saving / looks


def kill_somewhere(folder: Path, moment: float) -> bool:
    "Start a run and kill it after some seconds; return False if it had ended before."
    child = fork(lambda: train(folder))
    time.sleep(moment)
    return kill(child)


def kill_in_a_save(folder: Path, save: int, moment: float) -> bool:
    "Start a run and kill it some seconds after the start of a save; return False if it had ended before."
    child, seen, before = fork(lambda: train(folder)), 0, False
    while seen < save:
        now = in_a_save(folder)
        seen, before = seen + (now and not before), now
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    time.sleep(moment)
    return kill(child)


def kill(child: int) -> bool:
    "Kill a process with SIGKILL; return False if it had already ended."
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def outcome(folder: Path) -> tuple[str, list]:
    "Return a hash of the final weights, and the logged losses and gradient norms."
    weights = hashlib.sha256((folder / "final_model" / "model.safetensors").read_bytes()).hexdigest()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights, [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history]


def attempt(
    draw: random.Random, aimed: bool, pace: tuple[float, float, int], expected: tuple[str, list]
) -> dict | None:
    "Kill one run, resume it to its end, and compare; return None if it was not killed at the intended moment."
    folder, (seconds, save_seconds, saves) = Path("killed"), pace
    shutil.rmtree(folder, ignore_errors=True)
    if aimed:
        killed = kill_in_a_save(folder, draw.randint(1, saves), draw.uniform(0, save_seconds))
    else:
        killed = kill_somewhere(folder, draw.uniform(0, seconds))
    if not killed or (aimed and not in_a_save(folder)):
        return None
    left = list_checkpoints(folder)
    facts = {"in_a_save": in_a_save(folder), "from_step": int(left[-1].name.split("-")[1]) if left else 0}
    finish(lambda: train(folder))
    remains = [path.name for path in folder.glob(".*") if path.name != LOCK]
    return facts | {"equal": outcome(folder) == expected, "remains": remains}


def main() -> int:
    "Kill the requested number of runs; return 0 if all of them ended like the uninterrupted run."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    draw, kills = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        finish(prepare)
        seconds, saving = watch(Path("straight"))
        expected = outcome(Path("straight"))
        steps = int(list_checkpoints(Path("straight"))[-1].name.split("-")[1])
        saves = steps // SETTINGS["save_steps"]
        while len(kills) < arguments.kills:
            if facts := attempt(draw, len(kills) % 2 == 1, (seconds, saving / saves, saves), expected):
                kills.append(facts)
        os.chdir("/")
    good = [facts for facts in kills if facts["equal"] and not facts["remains"]]
    result = {
        "kills": len(kills),
        "ended_with_equal_weights_and_log": len(good),
        "killed_in_a_save": sum(facts["in_a_save"] for facts in kills),
        "killed_before_the_first_checkpoint": sum(not facts["from_step"] for facts in kills),
        "steps_of_a_run": steps,
        "steps_between_saves": SETTINGS["save_steps"],
        "resumed_from_steps": sorted(facts["from_step"] for facts in kills),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return int(len(good) < len(kills))


if __name__ == "__main__":
    sys.exit(main())
