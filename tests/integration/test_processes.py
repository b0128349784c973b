"Two processes share the steps of one."

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from forks import fork_server, forked_python
from launches import join_launch

from conftest import ARCHITECTURE, HANG, SETTINGS
from langmlm import tasks

COMMUNICATE_AND_EXIT = """
import ctypes, os, sys, threading
from accelerate import Accelerator
from langmlm.train.launch import StopRequest
from launches import join_launch

def need_python(path):
    threading.main_thread().join()
    open(path, "w").close()

for store in sys.argv[1:]:  # Two forks for each, which reach the end of the script
    children = []
    for rank in (0, 1):
        if (child := os.fork()) == 0:
            break
        children.append(child)
    if len(children) < 2:
        join_launch(2, rank, store)
        kept = Accelerator(cpu=True)
        assert kept.num_processes == 2
        threading.Thread(target=need_python, args=(f"{store}-{rank}",), daemon=True).start()  # As threads of gloo do
        assert not StopRequest().agree(kept)
        sys.setswitchinterval(1_000)  # Seconds until another thread interrupts this one, which does not wait by itself
        ctypes.pythonapi.Py_Exit(0)  # What Python does at the end of a script
    assert [os.wait()[1] for _ in children] == [0, 0], "a script did not end well"
"""


def train_as_one_of(
    rank: int, number: int, store: Path, given: dict, stop_at_step: int | None, environment: dict
) -> None:
    "Train in a child process."
    os.environ |= environment
    join_launch(number, rank, store)
    tasks.create_mlm(**given).train(stop_at_step)


def train_in_processes(
    number: int, given: dict, stop_at_step: int | None = None, environment: dict | None = None
) -> list[dict]:
    "Train, and return the log."
    store = Path(given["training_config"]["output_dir"]).with_suffix(f".store-{time.monotonic_ns()}")
    run_in_processes(number, train_as_one_of, number, store, given, stop_at_step, environment or {})
    return json.loads((Path(given["training_config"]["output_dir"]) / "trainer_state.json").read_text())["log_history"]


def run_in_processes(number: int, function: Callable, *arguments) -> None:
    "Call a function in several child processes, with the rank of each, and check that they end well."
    processes = [fork_server().Process(target=function, args=(rank, *arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    running, deadline = list(processes), time.monotonic() + HANG
    while running and not any(process.exitcode for process in processes) and time.monotonic() < deadline:
        wait([process.sentinel for process in running], HANG)
        running = [process for process in running if process.exitcode is None]
    for process in running:  # The others have failed or hang
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * number


def name_as_one_of(rank: int, store: Path, given: dict) -> None:
    "Create a run in a child process, and write down its name."
    join_launch(2, rank, store)
    task = tasks.create_mlm(**given, training_config={"run_name": f"run-{rank}", "use_cpu": True, "bf16": False})
    store.with_suffix(f".{rank}").write_text(f"{task.config.run_folder} {task.run_folder.config.run_folder}")


def test_processes_agree_on_the_name(data, tmp_path: Path):
    "The default is the time at which a process creates its config, so the name of the main process counts."
    given = {name: str(path) for name, path in data.items()} | {"model_config": ARCHITECTURE}
    run_in_processes(2, name_as_one_of, tmp_path / "store", given)
    assert [(tmp_path / f"store.{rank}").read_text() for rank in (0, 1)] == ["run-0 run-0"] * 2


def resume_one_of(rank: int, store: Path, given: dict) -> None:
    "Resume from a copy of a checkpoint, and write down the error."
    join_launch(2, rank, store)
    try:
        tasks.create_mlm(**given, checkpoint_path=store.with_name(f"disk-{rank}"), training_config={"learning_rate": 1e-3})
    except RuntimeError as error:
        store.with_suffix(f".{rank}").write_text(str(error))


def test_other_checkpoints_of_the_same_step(data, tmp_path: Path):
    "One machine has the checkpoint of an earlier attempt: two halves of different models would be trained on."
    given = {name: str(path) for name, path in data.items()}
    for rank in (0, 1):
        settings = SETTINGS | {"use_cpu": True, "max_steps": 2, "output_dir": str(tmp_path / f"disk-{rank}")}
        settings["learning_rate"] = 1e-3 * (rank + 1)
        tasks.create_mlm(**given, model_config=ARCHITECTURE, training_config=settings).train(1)
    run_in_processes(2, resume_one_of, tmp_path / "store", given)
    for rank in (0, 1):
        assert (tmp_path / f"store.{rank}").read_text().startswith("the digest of checkpoint_path is ")


def test_two_processes_equal_one(data, tmp_path: Path):
    "One process with 2 micro-batches per step has the data, masks, dropout and losses of two with 1 each, to rounding."
    histories = {}
    for number in (1, 2):
        settings = {
            **SETTINGS,
            "gradient_accumulation_steps": 2 // number,
            "use_cpu": True,
            "output_dir": str(tmp_path / f"run-{number}"),
        }
        given = {name: str(path) for name, path in data.items()} | {
            "model_config": ARCHITECTURE,
            "training_config": settings,
        }
        histories[number] = train_in_processes(number, given)
    assert [entry["step"] for entry in histories[1]] == [entry["step"] for entry in histories[2]]
    saved = [
        json.loads((tmp_path / f"run-{number}" / "trainer_state.json").read_text())["langmlm"] for number in (1, 2)
    ]
    assert [state["environment"]["processes"] for state in saved] == [1, 2]
    assert saved[0]["identity"] == saved[1]["identity"]
    for alone, shared in zip(histories[1], histories[2]):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_resuming_with_another_number_of_processes(data, tmp_path: Path):
    "A checkpoint of two processes is resumed by one and by four: the losses are those of the uninterrupted run."
    given = {name: str(path) for name, path in data.items()}
    settings = {**SETTINGS, "use_cpu": True, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 100}
    straight = {**given, "model_config": ARCHITECTURE}
    straight["training_config"] = {**settings, "output_dir": str(tmp_path / "run")}
    complete = train_in_processes(2, straight)
    stop = len(complete) // 2
    assert stop > 3
    for number, accumulation in ((1, 4), (4, 1)):
        folder = tmp_path / f"stopped-{number}"
        stopped = {**straight, "training_config": {**settings, "output_dir": str(folder)}}
        train_in_processes(2, stopped, stop)
        resumed = {**given, "checkpoint_path": str(folder), "training_config": {"output_dir": str(folder)}}
        history = train_in_processes(number, resumed)
        saved = json.loads((folder / "trainer_state.json").read_text())["langmlm"]
        assert saved["environment"]["processes"] == number
        assert saved["config"]["gradient_accumulation_steps"] == accumulation
        assert [entry["step"] for entry in history] == [entry["step"] for entry in complete]
        for one, two in zip(history, complete):
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_untied_embeddings(data, tmp_path: Path):
    "The head then has a bias that nothing uses: DDP must not wait for its gradient. Both processes train to the end."
    losses = []
    for number in (1, 2):
        settings = {**SETTINGS, "gradient_accumulation_steps": 2 // number, "use_cpu": True, "max_steps": 6}
        given = {name: str(path) for name, path in data.items()}
        given["model_config"] = {**ARCHITECTURE, "tie_word_embeddings": False}
        given["training_config"] = settings | {"output_dir": str(tmp_path / f"run-{number}")}
        losses.append([entry["loss"] for entry in train_in_processes(number, given)])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    saved = load_file(tmp_path / "run-2" / "final_model" / "model.safetensors")
    assert saved["lm_head.decoder.weight"].shape == saved["roberta.embeddings.word_embeddings.weight"].shape
    assert not torch.equal(saved["lm_head.decoder.weight"], saved["roberta.embeddings.word_embeddings.weight"])
    assert saved["lm_head.decoder.bias"].abs().max() > 0


def test_a_script_may_exit_at_once(tmp_path: Path):
    """Gloo's threads need Python for a moment after a collective; without the wait at exit, every third script aborted.

    A thread that needs Python when the script has ended gets it, too; without the wait it never does.
    """
    script, stores = tmp_path / "script.py", [tmp_path / f"store-{number}" for number in range(4)]
    script.write_text(COMMUNICATE_AND_EXIT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [forked_python(), script, *stores]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert all(Path(f"{store}-{rank}").exists() for store in stores for rank in (0, 1)), "a thread got no time"


START = """
import signal, sys
from langmlm import tasks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

def main():
    folder, failing = sys.argv[1:]
    settings = {"n_gpus": 2, "use_cpu": True, "output_dir": folder, **SETTINGS}
    task = tasks.create_mlm(**DATA, model_config=ARCHITECTURE, training_config=settings)
    if failing == "yes":
        task._arguments["tokenizer"] = "gone"
    before = [signal.getsignal(number) for number in SIGNALS]
    assert [entry["step"] for entry in task.train(stop_at_step=4).log_history] == [3]
    assert [entry["step"] for entry in task.train().log_history] == [3, 6, 9]
    assert [signal.getsignal(number) for number in SIGNALS] == before  # The launcher of PyTorch replaces them

"""


def start_script(data, tmp_path: Path, guarded: bool, failing: str = "no") -> subprocess.CompletedProcess:
    "Run a script that trains with two processes, as a user would start it."
    settings = {**SETTINGS, "gradient_accumulation_steps": 1, "max_steps": 9, "save_steps": 100}
    given = {name: str(path) for name, path in data.items()}
    constants = f"SETTINGS = {settings!r}\nDATA = {given!r}\nARCHITECTURE = {ARCHITECTURE!r}\n"
    (tmp_path / "temporary").mkdir()
    constants += f"import tempfile\ntempfile.tempdir = {str(tmp_path / 'temporary')!r}\n"
    script = tmp_path / "script.py"
    script.write_text(constants + START + ('if __name__ == "__main__":\n    main()' if guarded else "main()"))
    command = [forked_python(), script, tmp_path / "run", failing]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPU cores")
def test_n_gpus_starts_processes(data, tmp_path: Path):
    "From a plain script: two processes train, and a further call resumes in two processes; no temporary folder stays."
    finished = start_script(data, tmp_path, guarded=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    saved = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert saved["global_step"] == 9 and saved["langmlm"]["environment"]["processes"] == 2
    assert saved["langmlm"]["identity"]["gradient_accumulation_steps x processes"] == 2
    assert (tmp_path / "run" / "final_model" / "model.safetensors").is_file()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPU cores")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guarded": False}, 'n_gpus starts new processes, which import this script.*\n\nif __name__ == "__main__":\n'),
        ({"guarded": True, "failing": "yes"}, "RuntimeError: process [01] of 2 failed: .*gone"),
    ],
)
def test_errors_of_started_processes(data, tmp_path: Path, options: dict, message: str):
    "A script without the guard gets the lines to add; the error of a process is raised in the script."
    finished = start_script(data, tmp_path, **options)
    assert finished.returncode == 1 and re.search(message, finished.stderr), finished.stderr[-3000:]
    assert ("failed: its own error is printed above" in finished.stderr) == (not options["guarded"])
    assert not (tmp_path / "run").exists()
