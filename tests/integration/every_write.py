"""Processes that die at every single call that writes or changes a name.

A real kill runs no `finally` block: it leaves what the disk holds at that moment. Python reports every call that opens,
creates, renames, links or deletes a file to audit hooks, before it happens; a hook copies the folder before each of them.
One process of each scenario does die, at the call in the middle, with `os._exit`, which runs no `finally` block either;
it must leave what was copied there. All processes are forked from one that has imported everything and computed nothing.
"""

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import fork_server

from langmlm import tasks
from langmlm.disk import (
    atomic_folder,
    clean_up_interrupted,
    find_damage,
    is_intact,
    read_json,
    remove_folder,
    write_json,
    write_manifest,
)
from langmlm.folders import list_checkpoints
from langmlm.model.roberta import ModelConfig, build_model, complete_config
from langmlm.tokens.tokenizer import load_tokenizer
from langmlm.train.checkpoint import prune_checkpoints, save_checkpoint, save_model
from langmlm.train.sharding import gather_run

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
KILLED = 99  # Exit status of a process that died where it should
HANG = 1_500  # Seconds: catches hangs only


# Processes


def is_change(event: str, arguments: tuple, root: str) -> bool:
    "Return whether an audit event is about to write below a folder, or to change a name."
    if event == "open":
        path, _, flags = arguments
        return bool(flags & WRITING) and isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(root)
    return event in CHANGES


def run_and_die(action: Callable[[Path], Any], folder: Path, die_at: int, copies: Path | None) -> None:
    "Run an action in this process, which dies at a call (0: at none), and leaves the number of calls or its error."
    calls, is_copying = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal calls, is_copying
        if not is_copying and is_change(event, arguments, str(folder)):
            calls += 1
            if calls == die_at:
                os._exit(KILLED)
            if copies:
                is_copying = True
                shutil.copytree(folder, copies / str(calls), symlinks=True)
                is_copying = False

    sys.addaudithook(hook)
    try:
        action(folder)
        said = str(calls)
    except BaseException:
        said = traceback.format_exc()
    folder.with_name(f"{folder.name}.said").write_text(said)
    os._exit(0)


def run(action: Callable[[Path], Any], folder: Path, die_at: int = 0, copies: Path | None = None) -> int | None:
    """Fork a process that runs an action; return the number of its calls, or None if it died at one of them.

    `copies`: a folder for copies of the other one, made before each call, with its number as name.
    """
    child = os.fork()
    if child == 0:
        try:
            run_and_die(action, folder, die_at, copies)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == KILLED:
        return None
    said = folder.with_name(f"{folder.name}.said")
    if status or not said.read_text().isdecimal():
        raise RuntimeError(f"{action.__name__}, to die at call {die_at}, ended with {status}:\n{said.read_text()}")
    return int(said.read_text())


def in_clean_process(function: Callable, *arguments: Any) -> Any:
    "Call a function in a process that may be forked, because no library has started threads in it."
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        assert receiver.poll(HANG), f"{function.__name__}{arguments} hangs"
        result, error = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def _answer(sender: Any, function: Callable, arguments: tuple) -> None:
    "Send the result of a function, or its error."
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


# Results


LINES = [f"the {name} of document {number} says something" for number in range(60) for name in ("name", "end")]


def contents(folder: Path) -> dict[str, bytes | None]:
    "Everything below a folder, by name: the bytes of files, None for folders."
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}


def intact_states(folder: Path, name: str, damage: Callable[[Path], list[str]] = find_damage) -> list[str]:
    "The digests of a result that can be used, under its name or moved aside while its name is free."
    path = folder / name
    found = [path] if path.exists() else list(path.parent.glob(f".{path.name}.*.replaced"))
    return [read_json(path / "manifest.json")["digest"] for path in found if not damage(path)]


# What is interrupted: how the folder looks before, and what is done in it


def write_result(folder: Path, text: str, name: str = "result") -> None:
    "Write a small result in two levels."
    with atomic_folder(folder / name) as partial:
        (partial / "train").mkdir()
        (partial / "train" / "data").write_text(text)
        (partial / "weights").write_text(text)
        write_manifest(partial, "checkpoint", {"text": text})


def old_result(folder: Path) -> None:
    "An older result and a JSON file."
    write_result(folder, "old")
    write_json(folder / "facts.json", {"step": 1})


def replace_result(folder: Path) -> None:
    "Replace a folder and a file."
    clean_up_interrupted(folder, r"result|facts\.json")
    write_result(folder, "new")
    write_json(folder / "facts.json", {"step": 2})


def write_below(folder: Path) -> None:
    "Write a folder whose parents do not exist."
    write_result(folder, "new", name="a/b/result")


def remove_result(folder: Path) -> None:
    "Delete a folder."
    clean_up_interrupted(folder, "result")
    if (folder / "result").exists():
        remove_folder(folder / "result")


def write_text(folder: Path) -> None:
    "Text, and nothing else."
    (folder / "data.txt").write_text("\n".join(LINES))


def make_tokenizer(folder: Path, vocab_size: int = 290, **options) -> None:
    "Train a tokenizer and tokenize the text."
    paths = {"path_to_save_tokenizer": folder / "tokenizer", "path_to_save_dataset": folder / "dataset"}
    config = {"vocab_size": vocab_size, "max_length": 16, "num_workers": 1, **paths, **options}
    tasks.create_tokenizer(folder / "data.txt", config).train()


def old_tokenizer(folder: Path) -> None:
    "Text, and a tokenizer and a dataset made with other options."
    write_text(folder)
    make_tokenizer(folder, vocab_size=270)


def two_parts(folder: Path) -> None:
    "The parts of a dataset, and an older dataset."
    old_tokenizer(folder)
    for number in range(2):
        make_part(folder, number)


def make_part(folder: Path, number: int) -> None:
    "Tokenize one of two parts."
    options = {"max_length": 24, "shard": (number, 2), "path_to_save_dataset": folder / "dataset", "num_workers": 1}
    tasks.create_tokenizer(folder / "data.txt", options, tokenizer=folder / "tokenizer").train()


def join_parts(folder: Path) -> None:
    "Join two parts."
    tasks.join_dataset([folder / f"dataset.part-{number}-of-2" for number in range(2)], folder / "dataset")


ARCHITECTURE = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}


def save(folder: Path, *steps: int) -> None:
    "Save checkpoints with weights of their own, pruning all but the newest, and the final model."
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build_model(complete_config(ModelConfig(**ARCHITECTURE), tokenizer, 16), seed=0)
    optimizer_state = gather_run(model, torch.optim.AdamW(model.parameters()))[1]
    for step in steps:
        model.lm_head.bias.data += step
        state = {"global_step": step, "log_history": [], "langmlm": {}}
        save_checkpoint(folder / "run", model, tokenizer, optimizer_state, state)
        prune_checkpoints(folder / "run", save_total_limit=1)
    save_model(folder / "run" / "final_model", model, tokenizer)


def old_checkpoint(folder: Path) -> None:
    "A run with two checkpoints and a final model."
    old_tokenizer(folder)
    save(folder, 3)
    shutil.copytree(folder / "run" / "checkpoint-3", folder / "run" / "checkpoint-2")


def save_checkpoints(folder: Path) -> None:
    "Continue the run: replace a checkpoint, write a new one, prune, and replace the final model."
    clean_up_interrupted(folder / "run", r"checkpoint-\d+|final_model")
    save(folder, 3, 4)


SCENARIOS: dict[str, tuple[Callable, Callable, list[str]]] = {  # Before, action, its results
    "replace a folder": (old_result, replace_result, ["result"]),
    "write into new folders": (old_result, write_below, ["result", "a/b/result"]),
    "delete a folder": (old_result, remove_result, []),
    "first tokenizer and dataset": (write_text, make_tokenizer, ["tokenizer", "dataset"]),
    "another tokenizer and dataset": (old_tokenizer, make_tokenizer, ["tokenizer", "dataset"]),
    "join a dataset": (two_parts, join_parts, ["dataset"]),
    "save and prune checkpoints": (old_checkpoint, save_checkpoints, ["run/final_model"]),
}


def die_everywhere(scenario: str, work: Path) -> int:
    "Check what a death at every call of a scenario leaves, and run the action again; return the number of calls."
    prepare, action, results = SCENARIOS[scenario]
    before, after, middle = work / "before", work / "after", work / "middle"
    before.mkdir()
    run(prepare, before)
    for name in ("mine.txt", ".result.backup"):
        (before / name).write_text("mine")
    shutil.copytree(before, after)
    shutil.copytree(before, middle)
    calls = run(action, after, copies=work)
    assert run(action, middle, die_at=calls // 2) is None, f"it did not die at call {calls // 2} of {calls}"
    left, copied = (sorted(map(repr, contents(folder).values())) for folder in (middle, work / str(calls // 2)))
    assert left == copied, "a death leaves something else than what was copied"  # Names are random
    old = {name: states for name in results if (states := intact_states(before, name))}
    valid = {name: {*states, *intact_states(after, name)} for name, states in old.items()}
    deaths = {work / str(call): f"at call {call} of {calls}" for call in range(1, calls + 1)}
    deaths[middle] = "in the middle"
    for folder, moment in deaths.items():
        for name, digests in valid.items():
            assert set(intact_states(folder, name)) & digests, f"{name} is lost after a death {moment}"
        for manifest in folder.rglob("manifest.json"):
            if not any(part.startswith(".") for part in manifest.relative_to(folder).parts):
                assert find_damage(manifest.parent) == [], f"{manifest.parent} is half a result after a death {moment}"
        assert (folder / "mine.txt").read_text() == "mine" == (folder / ".result.backup").read_text()
        if (before / "run").exists():
            assert any(map(is_intact, list_checkpoints(folder / "run"))), f"no checkpoint after a death {moment}"
        action(folder)
        assert contents(folder) == contents(after), f"the rerun after a death {moment} ended otherwise"
        shutil.rmtree(folder)
    return calls
