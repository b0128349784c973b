"Two processes share the steps of one."

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ARCHITECTURE, HANG, SETTINGS

SCRIPT = """
import json, sys
from langmlm import tasks
given = json.loads(sys.argv[1])
tasks.create_mlm(**given).train()
"""

COMMUNICATE_AND_EXIT = """
from accelerate import Accelerator
from langmlm.train.launch import StopRequest, agree_to_stop
kept = Accelerator(cpu=True)
assert not agree_to_stop(StopRequest(), kept)
"""


def run_in_processes(number: int, script: Path, *arguments: str) -> None:
    "Start a script with torchrun on the CPU; all its processes must succeed."
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launcher, str(script), *arguments], capture_output=True, text=True, timeout=HANG, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def train_in_processes(number: int, given: dict) -> list[dict]:
    "Train, and return the log."
    script = Path(given["training_config"]["output_dir"]).with_suffix(".py")
    script.write_text(SCRIPT)
    run_in_processes(number, script, json.dumps(given))
    return json.loads((Path(given["training_config"]["output_dir"]) / "trainer_state.json").read_text())["log_history"]


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
    "Gloo's threads need Python for a moment after a collective; without the wait at exit, every third script aborted."
    script = tmp_path / "script.py"
    script.write_text(COMMUNICATE_AND_EXIT)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run_in_processes(2, script), range(4)))
