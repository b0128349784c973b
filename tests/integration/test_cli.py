"The command line as a user runs it: own text in an empty folder, from the tokenizer to filled masks, and its failures."

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from forks import forked_python
from sandbox import ROOT, environment

from langmlm.disk import read_json
from langmlm.text.corpus import docstrings

MODEL = "--num_hidden_layers 1 --hidden_size 32 --num_attention_heads 2 --intermediate_size 64".split()
RUN = "--per_device_train_batch_size 4 --gradient-accumulation-steps 1 --max_steps 40 --logging_steps 10".split()
RUN += "--save_steps 10 --bf16 false --learning_rate 2e-3".split()
WORDS = ["-m", "langmlm"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    "Run a command in a folder, in a fork; `test_command_line` of the tests of uploads starts Python itself."
    return subprocess.run([forked_python(), *WORDS, *words], cwd=folder, env=environment(ROOT), capture_output=True, text=True)


def succeed(folder: Path, *words: str) -> subprocess.CompletedProcess:
    "Run a command that must succeed."
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder: Path) -> bytes:
    "The weights of a final model."
    return (folder / "final_model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a text, and the tokenizer and dataset made from it."
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my text.txt").write_text("\n".join(islice(docstrings(), 400)), encoding="utf-8")
    done = succeed(folder, "tokenizer", "my text.txt", "--vocab_size", "500", "--max-length", "32")
    assert "documents" in done.stdout and "dataset: ./tokenized_dataset" in done.stdout
    return folder


def test_from_text_to_filled_masks(work: Path):
    "In two sessions, and once more from the options that the run has saved: the weights are the same bit for bit."
    stopped = succeed(work, "train", *MODEL, *RUN, "--output_dir", "first", "--stop_at_step", "15")
    assert stopped.stdout == "first\n" and "step 10 of 40: loss" in stopped.stderr
    assert succeed(work, "resume", "first").stdout == "first/final_model\n"
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    succeed(elsewhere, "train", "--config", "../first/options.yaml", "--output_dir", "again")
    assert weights(work / "first") == weights(elsewhere / "again")
    filled = succeed(work, "fill-mask", "first", "Return the <mask>.", "--top_k", "3").stdout.splitlines()
    assert filled[0] == "Return the <mask>." and filled[1].count("%") == 3
    shown = succeed(work, "info", "first").stdout
    assert "40 of 40" in shown and "hidden_size" in shown and "DAMAGED" not in shown
    assert succeed(work, "plot", "first", "elsewhere/again", "--output", "loss.png").stdout == "loss.png\n"
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")
    damaged = work / "first" / "checkpoint-40" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = run(work, "info", "first")
    assert found.returncode == 1 and "DAMAGED: checkpoint-40: optimizer.safetensors has 100 bytes" in found.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(work: Path, number: int, status: int):
    "A signal saves a checkpoint and ends the command with 128 + its number; the last line says how to resume."
    folder = f"stopped-{number}"
    words = ["train", *MODEL, *RUN, "--max_steps", "100000", "--output_dir", folder]
    process = subprocess.Popen([forked_python(), *WORDS, *words], cwd=work, env=environment(ROOT), stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (work / folder / "log.jsonl").is_file():
            time.sleep(0.1)
        process.send_signal(number)
        errors = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in errors
    assert errors.splitlines()[-1].endswith(f"to resume: langmlm resume {folder}")
    state = read_json(work / folder / "trainer_state.json")
    assert (work / folder / f"checkpoint-{state['global_step']}").is_dir()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPU cores")
def test_a_process_per_device(work: Path):
    "With `n_gpus`; Ctrl-C, which a terminal sends to all processes and the launcher repeats, saves a checkpoint."
    words = [*MODEL, *RUN, "--max_steps", "100000", "--n_gpus", "2", "--use_cpu"]
    (size, *_) = succeed(work, "bench", *words, "--steps", "2").stdout.splitlines()
    assert "100,000 steps" in size
    kept = {name: value for name, value in environment(ROOT).items() if name not in ("RANK", "WORLD_SIZE")}
    command = [forked_python(), *WORDS, "train", *words, "--output_dir", "shared"]
    process = subprocess.Popen(command, cwd=work, env=kept, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while process.poll() is None and not (work / "shared" / "log.jsonl").is_file():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors, errors[-3000:]
    assert "to resume: langmlm resume shared" in errors
    state = read_json(work / "shared" / "trainer_state.json")
    assert (work / "shared" / f"checkpoint-{state['global_step']}").is_dir()
    assert state["langmlm"]["environment"]["processes"] == 2
    more = state["global_step"] + 3
    assert succeed(work, "resume", "shared", "--n_gpus", "2", "--stop_at_step", str(more)).stdout == "shared\n"
    assert read_json(work / "shared" / "trainer_state.json")["global_step"] == more


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["train", "--hiden_size", "3"], 2),
        (["train", *MODEL, "--max_position_embeddings", "10"], 2),
        (["tokenizer", "missing.txt"], 1),
    ],
)
def test_errors_have_one_line(work: Path, words: list[str], status: int):
    "No traceback, and the name of what is wrong."
    before = sorted(os.listdir(work))
    done = run(work, *words)
    assert done.returncode == status and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"langmlm {words[0]}: error: ")
    assert sorted(os.listdir(work)) == before


def test_a_closed_pipe(work: Path):
    "`langmlm info ... | head -0` ends without a message."
    program = f"{forked_python()} -m langmlm info tokenizer | head -0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], cwd=work, env=environment(ROOT), capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")  # 0: written before `head` has ended


@pytest.mark.parametrize("redirect", ["", ">&-"])
def test_terminals_without_unicode_or_without_output(work: Path, redirect: str):
    "Neither is a reason to fail after the work is done."
    program = f"PYTHONIOENCODING=ascii {sys.executable} -m langmlm info tokenized_dataset {redirect}"
    done = subprocess.run(["bash", "-c", program], cwd=work, env=environment(ROOT), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert redirect or "lengths" in done.stdout and "?" in done.stdout
