"""Two machines with disks of their own share a run: one dies, both are started again, and one lacks a file.

The machines are network namespaces, each with a folder for its disk; where these are not permitted, two addresses.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from forks import forked_python

from conftest import ARCHITECTURE, HANG, SETTINGS

PORT, PREFIX = 20_000 + os.getpid() % 10_000, f"lm{os.getpid() % 10_000}"
SCRIPT = """
import logging, sys
from langmlm import tasks
from langmlm.train.spikes import LossSpike, handle_loss_spike

logging.basicConfig(level=logging.INFO)
start = {"model_config": ARCHITECTURE} if sys.argv[1] == "new" else {"checkpoint_path": "run"}
settings = SETTINGS if sys.argv[1] == "new" else {"output_dir": "run"}
task = tasks.create_mlm("tokenizer", "dataset", **start, training_config=settings)
if sys.argv[2:]:
    task.train(stop_at_step=4)
    spike, checkpoints = LossSpike(4, "the loss is high"), task.run_folder.rollback_checkpoints(task.state)
    handle_loss_spike(spike, task.model, task.optimizer, task.accelerator, task.state, task.config, checkpoints, None)
task.train()
"""


def run(*command) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


@dataclass
class Machine:
    "A disk, an address, and the prefix of commands that run there."

    disk: Path
    address: str
    interface: str
    name: str  # As its errors call it
    namespace: str = ""
    job: subprocess.Popen | None = None

    def start(self, rank: int, address: str, *arguments: str) -> None:
        "Start the script with the launcher of PyTorch, as every machine of a cluster does."
        name = f'hostname {self.name} && exec "$0" "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", name] if self.namespace else []
        launcher = [forked_python(), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        meeting = ["--node_rank", str(rank), "--master_addr", address, "--master_port", str(PORT)]
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with open(self.disk / "output", "w") as output:
            self.job = subprocess.Popen(
                [*inside, *launcher, *meeting, self.disk / "script.py", *arguments],
                cwd=self.disk,
                env=kept | {"GLOO_SOCKET_IFNAME": self.interface, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        "Kill the launcher and its workers: everything that runs in the folder."
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] == str(self.disk):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.job.wait()

    def output(self) -> str:
        return (self.disk / "output").read_text()


@pytest.fixture
def machines(data, tmp_path: Path) -> Iterator[list[Machine]]:
    "Two machines, each with the data on its own disk."
    names = [f"{PREFIX}{letter}" for letter in "ab"]
    permitted = all([run("ip", "netns", "add", name) for name in names])
    permitted = permitted and run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1])
    permitted = permitted and run("unshare", "--uts", "true")
    made = []
    for number, name in enumerate(names, 1):
        disk = tmp_path / name
        shutil.copytree(data["tokenizer"], disk / "tokenizer")
        shutil.copytree(data["tokenized_dataset"], disk / "dataset")
        settings = {**SETTINGS, "use_cpu": True, "output_dir": "run", "per_device_train_batch_size": 2}
        settings |= {"gradient_accumulation_steps": 1, "num_train_epochs": 100, "logging_steps": 4}
        (disk / "script.py").write_text(f"SETTINGS, ARCHITECTURE = {settings!r}, {ARCHITECTURE!r}\n{SCRIPT}")
        if permitted:
            inside = "ip", "-n", name
            run("ip", "link", "set", name, "netns", name)
            run(*inside, "addr", "add", f"10.99.0.{number}/24", "dev", name)
            run(*inside, "link", "set", name, "up")
            run(*inside, "link", "set", "lo", "up")
            made.append(Machine(disk, f"10.99.0.{number}", name, f"node-{number}", name))
        else:
            made.append(Machine(disk, f"127.0.0.{number + 1}", "lo", os.uname().nodename))
    yield made
    for machine in made:
        if machine.job:
            machine.kill()
    for name in names:
        run("ip", "netns", "del", name)


def start(machines: list[Machine], *arguments: str) -> None:
    for rank, machine in enumerate(machines):
        machine.start(rank, machines[0].address, *arguments)


def wait_until(condition, machines: list[Machine]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, [machine.output()[-2000:] for machine in machines]
        time.sleep(0.1)


def test_one_machine_dies(machines: list[Machine]):
    "The other stops with an error that says how to resume; what one disk lacks is named; then the run resumes."
    first, second = machines
    start(machines, "new")
    wait_until(lambda: (first.disk / "run" / "checkpoint-8").exists() or first.job.poll(), machines)
    second.kill()
    died = time.monotonic()
    assert first.job.wait(HANG) == 1
    assert time.monotonic() - died < HANG / 5  # Seconds on an idle machine; without an error, half an hour
    remedy = "another process of this run has ended or cannot be reached, see its log: start all processes again"
    assert f"{remedy} with checkpoint_path='run'" in first.output()

    def assert_both_stop(message: str, *arguments: str) -> None:
        start(machines, *arguments)
        assert [machine.job.wait(HANG) for machine in machines] == [1, 1]
        assert message in first.output(), first.output()[-3000:]

    assert not (second.disk / "run").exists()
    assert_both_stop(f"process 1 on {second.name} failed: ValueError: checkpoint_path='run' is neither", "resume")
    shutil.copytree(first.disk / "run", second.disk / "run")
    checkpoints = sorted((second.disk / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.rmtree(checkpoints[-1])
    steps = [int(path.name[11:]) for path in checkpoints[-2:]]
    message = f"the step of checkpoint_path is {steps[1]} for process 0 on {first.name}, but {steps[0]} for process 1"
    assert_both_stop(message, "resume")
    shutil.copytree(first.disk / "run" / checkpoints[-1].name, checkpoints[-1])
    start(machines, "resume")
    wait_until(lambda: (first.disk / "run" / f"checkpoint-{steps[1] + 4}").exists() or first.job.poll(), machines)
    state = json.loads((first.disk / "run" / f"checkpoint-{steps[1] + 4}" / "trainer_state.json").read_text())
    logged = [entry["step"] for entry in state["log_history"]]
    assert logged == list(range(4, state["global_step"] + 1, 4)) and state["global_step"] > steps[1]


def test_an_older_copy_of_the_options(machines: list[Machine]):
    "Both stop before the first step: with another learning rate they would train two models, with fewer steps they would hang."
    first, second = machines
    script = (second.disk / "script.py").read_text()
    for name, old, new in (("learning_rate", "0.002", "0.004"), ("num_train_epochs", "100", "99"), ("hidden_size", "32", "64")):
        assert f"'{name}': {old}" in script
        (second.disk / "script.py").write_text(script.replace(f"'{name}': {old}", f"'{name}': {new}"))
        start(machines, "new")
        assert [machine.job.wait(HANG) for machine in machines] == [1, 1]
        assert f"{name} is {old} for process 0 on {first.name}, but {new} for process 1" in first.output()
        assert not (first.disk / "run").exists()


def test_rollback_without_the_checkpoint(machines: list[Machine]):
    "Only the first machine has the checkpoint of a rollback, which both need: both stop, and the other one is named."
    start(machines, "new", "and roll back")
    assert [machine.job.wait(HANG) for machine in machines] == [1, 1]
    first, second = machines
    assert f"process 1 on {second.name} failed: ValueError: checkpoint_path='run/checkpoint-4'" in first.output()
