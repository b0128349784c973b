"""Kill training runs at random moments, resume each one, and compare its weights with those of an uninterrupted run.

    python benchmarks/kill_runs.py --kills 100 --write

Half of the kills come at any moment of a run, the other half during a save. One process imports everything once and is
forked for each run; it computes nothing itself, so every run starts like a new process.
`--write` stores the results in `benchmarks/results/kill_runs.json`, which the tutorial `resume` shows.
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
from langmlm.disk import LOCK
from langmlm.folders import list_checkpoints
from langmlm.text.corpus import docstrings

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
    "Resume the run in a folder, or start it again if it has no checkpoint yet."
    if list_checkpoints(folder):
        tasks.create_mlm(**DATA, checkpoint_path=folder, resume="full").train()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        tasks.create_mlm(**DATA, model_config=ARCHITECTURE, training_config={**SETTINGS, "output_dir": folder}).train()


def fork(action: Callable[[], None]) -> int:
    "Run an action in a child process, with its output in `log.txt`, and return the process id."
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
    "Run an action in a child process, and wait for its end."
    _, status = os.waitpid(fork(action), 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}:\n{Path('log.txt').read_text()[-3000:]}")


def is_saving(folder: Path) -> bool:
    "Return whether a checkpoint is being written, replaced or deleted in the folder of a run."
    return any(path.suffix in (".partial", ".replaced", ".outdated") for path in folder.glob(".checkpoint-*"))


def measure_run(folder: Path) -> tuple[float, float]:
    "Train to the end, and return the seconds that this took and the seconds spent in saves."
    child, began, polls, saving = fork(lambda: train(folder)), time.monotonic(), 0, 0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        polls, saving = polls + 1, saving + is_saving(folder)
        time.sleep(0.0002)
    if ended[1]:
        raise RuntimeError(
            f"the uninterrupted run ended with status {ended[1]}:\n{Path('log.txt').read_text()[-3000:]}"
        )
    seconds = time.monotonic() - began
    return seconds, seconds * saving / polls


def kill_after(folder: Path, moment: float) -> bool:
    "Start a run and kill it after some seconds; return False if it had already ended."
    child = fork(lambda: train(folder))
    time.sleep(moment)
    return kill(child)


def kill_during_save(folder: Path, save: int, moment: float) -> bool:
    "Start a run and kill it some seconds after the start of a save; return False if it had already ended."
    child, seen, before = fork(lambda: train(folder)), 0, False
    while seen < save:
        now = is_saving(folder)
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


def result_of_run(folder: Path) -> tuple[str, list]:
    "Return a hash of the final weights, and the logged losses and gradient norms."
    weights = hashlib.sha256((folder / "final_model" / "model.safetensors").read_bytes()).hexdigest()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights, [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history]


def kill_and_resume(
    generator: random.Random, during_save: bool, durations: tuple[float, float, int], expected: tuple[str, list]
) -> dict | None:
    "Kill one run, resume it to its end, and compare; return None if the kill missed its moment."
    folder, (seconds, save_seconds, saves) = Path("killed"), durations
    shutil.rmtree(folder, ignore_errors=True)
    if during_save:
        killed = kill_during_save(folder, generator.randint(1, saves), generator.uniform(0, save_seconds))
    else:
        killed = kill_after(folder, generator.uniform(0, seconds))
    if not killed or (during_save and not is_saving(folder)):
        return None
    checkpoints = list_checkpoints(folder)
    from_step = int(checkpoints[-1].name.split("-")[1]) if checkpoints else 0
    facts = {"during_save": is_saving(folder), "from_step": from_step}
    finish(lambda: train(folder))
    leftovers = [path.name for path in folder.glob(".*") if path.name != LOCK]
    return facts | {"equal": result_of_run(folder) == expected, "leftovers": leftovers}


def main() -> int:
    "Kill the requested number of runs; return 0 if all of them ended with the expected weights and log."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    generator, kills = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        finish(prepare)
        seconds, saving = measure_run(Path("uninterrupted"))
        expected = result_of_run(Path("uninterrupted"))
        steps = int(list_checkpoints(Path("uninterrupted"))[-1].name.split("-")[1])
        saves = steps // SETTINGS["save_steps"]
        while len(kills) < arguments.kills:
            during_save = len(kills) % 2 == 1
            if facts := kill_and_resume(generator, during_save, (seconds, saving / saves, saves), expected):
                kills.append(facts)
        os.chdir("/")
    good = [facts for facts in kills if facts["equal"] and not facts["leftovers"]]
    result = {
        "kills": len(kills),
        "equal_weights_and_log": len(good),
        "killed_during_a_save": sum(facts["during_save"] for facts in kills),
        "killed_before_the_first_checkpoint": sum(not facts["from_step"] for facts in kills),
        "steps_per_run": steps,
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
