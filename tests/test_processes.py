"Two processes share the steps that one would do alone."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ARCHITECTURE, SETTINGS

SCRIPT = """
import json, sys
from langmlm import tasks
given = json.loads(sys.argv[1])
tasks.create_mlm(**given).train()
"""


def train_in_processes(number: int, given: dict) -> list[dict]:
    "Train under `accelerate launch` on the CPU, and read the log."
    script = Path(given["training_config"]["output_dir"]).with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    finished = subprocess.run(
        [*launcher, "--num_processes", str(number), "--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(script), json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((Path(given["training_config"]["output_dir"]) / "trainer_state.json").read_text())["log_history"]


def test_two_processes_are_one(data, tmp_path: Path):
    "One process with 2 micro-batches in a step, two with 1 each: the same data, masks and dropout, so the same losses to rounding."
    histories = {}
    for number in (1, 2):
        settings = {**SETTINGS, "gradient_accumulation_steps": 2 // number, "use_cpu": True, "output_dir": str(tmp_path / f"run-{number}")}
        given = {name: str(path) for name, path in data.items()} | {"model_config": ARCHITECTURE, "training_config": settings}
        histories[number] = train_in_processes(number, given)
    assert [entry["step"] for entry in histories[1]] == [entry["step"] for entry in histories[2]]
    for alone, shared in zip(histories[1], histories[2]):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
