"Runs that are killed, interrupted, out of disk space, or resumed with other data lose nothing and do not mix."

import ctypes
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import kill_runs
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from helpers import same_weights
from safetensors.torch import load_file
from forks import fork_server, forked_python

from conftest import ARCHITECTURE, HANG, SETTINGS
from langmlm import tasks
from langmlm.disk import disk_error, find_damage, is_intact, lock_folder, read_json
from langmlm.folders import list_checkpoints


def given(data: dict[str, Path], folder: Path, **changes) -> dict:
    "The arguments of `create_mlm`, as JSON, for a run that is too long to end before it is stopped."
    settings = {**SETTINGS, "num_train_epochs": 2_000, "output_dir": str(folder), "disable_tqdm": True, **changes}
    paths = {name: str(path) for name, path in data.items()}
    return {**paths, "model_config": ARCHITECTURE, "training_config": settings}


def train_in_process(arguments: dict) -> None:
    "Train, in a child process."
    torch.set_num_threads(1)
    tasks.create_mlm(**arguments).train()


def train_slowly(arguments: dict, started: Path, log: Path) -> None:
    "Train with steps that never end, in a child process; a file says that one has begun, another what is logged."
    import langmlm.train.loop

    logging.basicConfig(filename=log)

    def step(*ignored) -> None:
        started.touch()
        time.sleep(2 * HANG)

    langmlm.train.loop.train_step = step
    train_in_process(arguments)


@contextmanager
def child(action: Callable, *arguments) -> Iterator[multiprocessing.Process]:
    "Run a function in a process, which is killed at the end if it is still running."
    process = fork_server().Process(target=action, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], object]) -> None:
    "Wait for a condition."
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < HANG, "waited too long"
        time.sleep(0.01)


def checkpoint_step(folder: Path) -> int:
    "The step of the newest checkpoint, which must be intact."
    newest = list_checkpoints(folder)[-1]
    assert find_damage(newest) == []
    return read_json(newest / "trainer_state.json")["global_step"]


@contextmanager
def when_logged(text: str, action: Callable[[], None]) -> Iterator[list[str]]:
    "Do something once when a message that contains a text is logged; yields all messages."
    messages, pending = [], [action]

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            if text in messages[-1] and pending:
                pending.pop()()

    logger, listener = logging.getLogger("langmlm"), Listener()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        yield messages
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)


# Kills and signals


def kill_three_runs(output: Path) -> None:
    "Call `benchmarks/kill_runs.py`, in a child process."
    torch.set_num_threads(1)
    sys.argv = ["kill_runs.py", "--kills", "3", "--seed", "1"]
    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(kill_runs.main())


def test_killed_runs_end_like_uninterrupted_ones(tmp_path: Path):
    "A few of the kills that `benchmarks/kill_runs.py` makes a hundred of."
    with child(kill_three_runs, tmp_path / "output") as process:
        process.join(HANG)
        assert process.exitcode == 0, (tmp_path / "output").read_text(encoding="utf-8")[-3000:]


def test_sigterm_saves_a_checkpoint(data, resume, tmp_path: Path):
    "SIGTERM: the step in progress is finished and saved, and the exit status is the usual one."
    with child(train_in_process, given(data, tmp_path / "run", save_steps=10**6)) as process:
        wait_for((tmp_path / "run" / "log.jsonl").exists)
        os.kill(process.pid, signal.SIGTERM)
        process.join(HANG)
        assert process.exitcode == 128 + signal.SIGTERM
    assert 0 < checkpoint_step(tmp_path / "run") < 10**6
    assert resume(tmp_path / "run").state.step == checkpoint_step(tmp_path / "run")


def test_ctrl_c_in_a_script(data, tmp_path: Path):
    "SIGINT: the same, as KeyboardInterrupt, whose message says how to resume."
    script = tmp_path / "script.py"
    script.write_text(f"from langmlm import tasks\ntasks.create_mlm(**{given(data, tmp_path / 'run')!r}).train()")
    with subprocess.Popen([forked_python(), script], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list_checkpoints(tmp_path / "run"))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=HANG)[1]
    assert process.returncode == -signal.SIGINT  # Which a shell shows as 130
    last_line = said.strip().splitlines()[-1]
    assert last_line.startswith(f"KeyboardInterrupt: SIGINT: stopped after step {checkpoint_step(tmp_path / 'run')} of")
    assert f"resume with checkpoint_path={str(tmp_path / 'run')!r}" in last_line


def test_a_second_signal_stops_at_once(data, tmp_path: Path):
    "A second signal does not wait for a step that takes longer than anybody would."
    started, log = tmp_path / "started", tmp_path / "log"
    with child(train_slowly, given(data, tmp_path / "run"), started, log) as process:
        wait_for(started.exists)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: "a second signal stops at once" in log.read_text())
        process.join(1)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGTERM)
        process.join(HANG)
        assert process.exitcode == 128 + signal.SIGTERM
    assert list_checkpoints(tmp_path / "run") == []


IN_TERMINAL = """
import logging, os, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it, for these tests, too
os.setsid()
os.open(os.ttyname(0), os.O_RDWR)  # The first terminal that the leader of a session opens controls it
from langmlm import tasks
logging.basicConfig(level=logging.INFO)
tasks.create_mlm(**{arguments!r}).train()
"""


def test_closed_terminal(data, resume, tmp_path: Path):
    "A connection that breaks, with a progress bar and a log that can no longer be written: nothing is lost."
    script, output = tmp_path / "script.py", b""
    script.write_text(IN_TERMINAL.format(arguments=given(data, tmp_path / "run", save_steps=10**6, disable_tqdm=False)))
    outside, inside = os.openpty()
    with subprocess.Popen([forked_python(), script], stdin=inside, stdout=inside, stderr=inside) as process:
        os.close(inside)
        while b"step 6 of" not in output:
            output += os.read(outside, 4096)
        os.close(outside)
        assert process.wait(HANG) == 128 + signal.SIGHUP
    assert 6 <= checkpoint_step(tmp_path / "run") < 10**6
    assert resume(tmp_path / "run").state.step == checkpoint_step(tmp_path / "run")


def test_stopped_in_the_last_step(create, tmp_path: Path):
    "Nothing is left to resume, which the message says; the model is complete."
    run = create(tmp_path / "run", max_steps=4)
    with when_logged("step 3 of", lambda: signal.raise_signal(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 4; .*: all steps are done$"):
            run.train()
    assert is_intact(tmp_path / "run" / "final_model")


def test_stopped_in_a_notebook(create, tmp_path: Path):
    "The stop button raises KeyboardInterrupt; calling `train` again continues, and the end is the same."
    straight, stopped = create(tmp_path / "straight"), create(tmp_path / "stopped", save_steps=1_000)
    straight.train()
    with when_logged("step 3 of", lambda: signal.raise_signal(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt, match="SIGINT: stopped after step 4 of"):
            stopped.train()
    assert checkpoint_step(tmp_path / "stopped") == 4  # The next one, since step 3 was over when it was logged
    stopped.train()
    assert same_weights(stopped, straight)


def test_training_in_a_thread(create, tmp_path: Path):
    "Only the main thread may handle signals; training works in other threads too."
    task = create(tmp_path / "run", max_steps=2)
    thread = threading.Thread(target=task.train)
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "final_model").is_dir()


IN_PROCESSES = """
import os, sys
from pathlib import Path
from langmlm import tasks
task = tasks.create_mlm(**{arguments!r})
Path(f"pid-{{task.accelerator.process_index}}").write_text(str(os.getpid()))
try:
    task.train()
except SystemExit as stopped:
    Path(f"step-{{task.accelerator.process_index}}").write_text(f"{{task.state.step}} {{stopped.code}}")
"""


def test_all_processes_stop_at_the_same_step(data, resume, tmp_path: Path):
    "Only one of two processes gets the signal."
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESSES.format(arguments=given(data, tmp_path / "run", use_cpu=True)))
    command = [forked_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: list_checkpoints(tmp_path / "run"))
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
        assert process.wait(HANG) == 0
    stops = [(tmp_path / f"step-{number}").read_text() for number in (0, 1)]
    assert stops == [f"{checkpoint_step(tmp_path / 'run')} 143"] * 2
    with when_logged("nothing", lambda: None) as messages:  # One process does the work of two
        alone = resume(tmp_path / "run")
    assert alone.config.gradient_accumulation_steps == 4
    assert any("not be bit-identical" in message and "processes: then 2, now 1" in message for message in messages)
    alone.train(stop_at_step=alone.state.step + 1)


def test_one_run_in_a_folder(data, resume, tmp_path: Path):
    "A second run in the same folder raises an error until the first one has ended."
    with child(train_in_process, given(data, tmp_path / "run")) as process:
        wait_for(lambda: list_checkpoints(tmp_path / "run"))
        second = resume(tmp_path / "run", num_train_epochs=1)
        with pytest.raises(RuntimeError, match="is in use by another run"):
            second.train()
        process.kill()
        process.join()
    third = resume(tmp_path / "run")
    third.train(stop_at_step=third.state.step + 1)
    assert checkpoint_step(tmp_path / "run") == third.state.step


# Disks


class SmallDisk:
    "A file system of two megabytes, which holds a few checkpoints."

    full = "No space left on device .*, 0.0 MB are free"  # What the log says

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"
        self.named = str(folder)  # In errors of tokenizing

    def fill(self) -> None:
        "Take all space that is left."
        with open(self.ballast, "wb", buffering=0) as stream, pytest.raises(OSError):
            while stream.write(bytes(4096)):
                pass

    def clear(self) -> None:
        "Give the space back."
        self.ballast.unlink(missing_ok=True)


class SmallQuota(SmallDisk):
    "A limit for the files of this process: needs no rights, and no file of a checkpoint's weights fits."

    full = "File too large"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.named = tempfile.gettempdir()  # The copy of the text that the tokenizer is trained on is the first file

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture(params=["disk", "quota"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    "A place for files that can be filled: a file system where one can be mounted, and a quota everywhere."
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "quota":
        yield (quota := SmallQuota(folder))
        quota.clear()
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs rights; the variant with a quota runs")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk(create, small_disk: SmallDisk, tmp_path: Path):
    "Failed saves are logged, training continues, the next save is tried, and in the end nothing is missing."
    folder = small_disk.folder / "run"
    straight, task = create(tmp_path / "straight", save_total_limit=1), create(folder, save_total_limit=1)
    straight.train()
    task.train(stop_at_step=4)
    small_disk.fill()
    with when_logged("checkpoint-8 could not be saved", small_disk.clear) as messages:
        task.train()
    (text,) = [message for message in messages if "could not be saved" in message]
    assert re.search(small_disk.full, text)
    assert same_weights(task, straight) and checkpoint_step(folder) == task.state.step
    assert (folder / "final_model").is_dir()


def test_disk_that_stays_full(create, small_disk: SmallDisk):
    "The run ends with an error that says what is in memory only; existing files are intact, and nothing is half-written."
    folder = small_disk.folder / "run"
    task = create(folder, save_total_limit=1)
    task.train(stop_at_step=4)
    before = sorted(path.name for path in folder.iterdir())
    small_disk.fill()
    with pytest.raises(OSError, match=f"checkpoint-{task.loader.plan.total_steps} and final_model could not be saved"):
        task.train()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert checkpoint_step(folder) == 4
    small_disk.clear()
    task.train()
    assert checkpoint_step(folder) == task.loader.plan.total_steps
    saved = load_file(folder / "final_model" / "model.safetensors")
    assert torch.equal(saved["lm_head.bias"], task.model.lm_head.bias)


def tokenize(folder: Path, text: Path, **options) -> None:
    "Train a tokenizer and make a dataset in a folder."
    paths = {"path_to_save_tokenizer": folder / "tokenizer", "path_to_save_dataset": folder / "dataset"}
    tasks.create_tokenizer(text, {"vocab_size": 400, "max_length": 32, **paths, **options}).train()


def files_of(folder: Path) -> dict[str, bytes]:
    "All files below a folder, without those that a job resumes from."
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name[0] != "." and name != "ballast"}


def test_tokenizing_on_a_full_disk(data, small_disk: SmallDisk, tmp_path: Path):
    "The error says what and where, older results are as they were, and the same call completes when there is space."
    text = tmp_path / "text.txt"
    text.write_text((data["tokenizer"].parent / "data.txt").read_text(encoding="utf-8") * 10, encoding="utf-8")
    (straight := tmp_path / "straight").mkdir()
    tokenize(straight, text, vocab_size=500)
    tokenize(small_disk.folder, data["tokenizer"].parent / "data.txt")
    before = files_of(small_disk.folder)
    small_disk.fill()
    with pytest.raises(Exception) as caught:
        tokenize(small_disk.folder, text, vocab_size=500)
    assert disk_error(caught.value) and small_disk.named in str(caught.value), caught.value
    assert files_of(small_disk.folder) == before and len(before) > 8
    small_disk.clear()
    tokenize(small_disk.folder, text, vocab_size=500)
    assert files_of(small_disk.folder) == files_of(straight)
    assert [path for path in small_disk.folder.iterdir() if path.name[0] == "."] == []


def train_with_small_files(arguments: dict) -> None:
    "Train under a file size limit of 50 kB until a save has failed, in a child process."
    task = tasks.create_mlm(**arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="checkpoint-4 could not be saved .*there is no checkpoint"):
        task.train(stop_at_step=4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    task.train(stop_at_step=4)


def test_file_size_limit(data, tmp_path: Path):
    "A quota acts like a full disk."
    with child(train_with_small_files, given(data, tmp_path / "run")) as process:
        process.join(HANG)
        assert process.exitcode == 0
    assert checkpoint_step(tmp_path / "run") == 4


def obey_permissions(obey: bool) -> None:
    "Make root obey the permissions of files in this thread, as other users must; or let it ignore them again."
    if os.geteuid() != 0:
        return
    libc, dac_override = ctypes.CDLL(None, use_errno=True), 1 << 1
    header, sets = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )  # Version 3; this thread; effective first
    assert libc.capget(header, sets) == 0
    sets[0] = sets[0] & ~dac_override if obey else sets[0] | sets[1] & dac_override
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def test_tokenizing_into_a_read_only_folder(tmp_path: Path):
    "An error names the option before any work, and nothing is written."
    read_only = tmp_path / "folder"
    read_only.mkdir()
    read_only.chmod(0o555)
    obey_permissions(True)
    try:
        for option in ("path_to_save_tokenizer", "path_to_save_dataset"):
            with pytest.raises(PermissionError, match=f"{option}=.* cannot be written to: you may not create files in"):
                tasks.create_tokenizer(iter(["some text"]), {option: read_only / "result"})
        with pytest.raises(PermissionError, match="output_dir=.* cannot be written to"):
            lock_folder(read_only / "run", "output_dir")
        assert list(read_only.iterdir()) == []
    finally:
        obey_permissions(False)


def test_read_only_folder(create, tmp_path: Path):
    "A folder that is read-only for a while loses only the saves of that time."
    task, folder = create(tmp_path / "run", save_steps=7), tmp_path / "run"

    def make_read_only() -> None:
        folder.chmod(0o555)
        obey_permissions(True)

    def make_writable() -> None:
        folder.chmod(0o755)
        obey_permissions(False)

    folder.mkdir()
    make_read_only()
    with pytest.raises(PermissionError):
        (folder / "probe").touch()
    make_writable()
    with (
        when_logged("step 3 of", make_read_only),
        when_logged("checkpoint-7 could not be saved", make_writable) as messages,
    ):
        task.train()
    assert any("log.jsonl did not get the entry of step 6" in message for message in messages)
    last = task.loader.plan.total_steps
    assert checkpoint_step(folder) == last >= 14 and (folder / "final_model").is_dir()
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}" for step in sorted({14, last})]


def test_trackers_that_fail(create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "An unreachable tracker does not stop the run."
    task = create(tmp_path / "run", report_to=["tensorboard"], logging_dir=tmp_path / "logs", max_steps=4)

    def fail(*ignored, **settings) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(task.accelerator, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    with when_logged("nothing", lambda: None) as messages:
        task.train()
    assert sum("the server is away" in message for message in messages) == 3  # Steps 3 and 4, and the end
    assert (tmp_path / "run" / "final_model").is_dir()


# Resuming with other options


def test_other_logging_steps(create, resume, tmp_path: Path):
    "The logging interval changes nothing but the log."
    straight = create(tmp_path / "straight")
    straight.train()
    create(tmp_path / "run").train(stop_at_step=5)
    (tmp_path / "run" / "trainer_state.json").write_text('{"global_st')  # Torn; a checkpoint has its own
    resumed = resume(tmp_path / "run", logging_steps=1)
    resumed.train()
    assert same_weights(resumed, straight)
    assert [entry["step"] for entry in resumed.state.log_history][:3] == [3, 6, 7]


def test_more_epochs(create, resume, tmp_path: Path):
    "A run that is extended equals one that was long from the start, if the schedule does not depend on the length."
    settings = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
    straight = create(tmp_path / "straight", num_train_epochs=3, **settings)
    straight.train()
    create(tmp_path / "run", **settings).train()
    with when_logged("nothing", lambda: None) as messages:
        resumed = resume(tmp_path / "run", num_train_epochs=3)
    assert any("changed settings: num_train_epochs: then 2, now 3" in message for message in messages)
    resumed.train()
    assert same_weights(resumed, straight)


def test_other_runs_are_rejected(data, create, tmp_path: Path):
    "Other data, tokenizer, architecture, lengths, batches or masks: the error names them with both values and the remedy."
    create(tmp_path / "run").train(stop_at_step=1)
    text = (data["tokenizer"].parent / "data.txt").read_text(encoding="utf-8")
    for name, content in (("same", text), ("other", text.upper())):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")

    def make(name: str, text: str, tokenizer: Path | None, max_length: int = 32) -> dict[str, Path]:
        config = {"max_length": max_length, "path_to_save_dataset": tmp_path / name}
        own = {"vocab_size": 500, "path_to_save_tokenizer": tmp_path / f"{name}-tokenizer"}
        tasks.create_tokenizer(tmp_path / text, config if tokenizer else config | own, tokenizer=tokenizer).train()
        return {"tokenizer": tokenizer or own["path_to_save_tokenizer"], "tokenized_dataset": tmp_path / name}

    def error_of(changed: dict | None = None, model_config: dict | None = None, **settings) -> str:
        with pytest.raises(ValueError) as error:
            arguments = {**(changed or data), "model_config": model_config, "training_config": settings}
            tasks.create_mlm(**arguments, checkpoint_path=tmp_path / "run")
        return str(error.value)

    message = error_of(make("text", "other.txt", data["tokenizer"]))
    assert "dataset: then " in message and ", now " in message and "resume='weights'" in message and len(message) < 300
    assert "tokenizer: then " in error_of(make("words", "other.txt", None))
    assert "max_length: then 32, now 24" in error_of(make("shorter", "same.txt", data["tokenizer"], 24))
    assert "max_position_embeddings=34" in error_of(make("longer", "same.txt", data["tokenizer"], 48))
    assert "hidden_size=48, but the model has 32: leave model_config out" in error_of(model_config={"hidden_size": 48})
    for name, value in (
        ("per_device_train_batch_size", 4),
        ("packing", False),
        ("seed", 7),
        ("mlm_probability", 0.3),
        ("whole_word_masking", True),
    ):
        assert f"{name}: then {SETTINGS.get(name, getattr(tasks.TrainingConfig, name, None))}, now {value}" in error_of(
            **{name: value}
        )
    assert "gradient_accumulation_steps x processes: then 2, now 4" in error_of(gradient_accumulation_steps=4)
