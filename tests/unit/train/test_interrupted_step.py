"A session that was interrupted within a step continues as if nothing had happened, or says that it cannot."

from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import same_weights

from langmlm import tasks
from langmlm.testing import tiny_run
from langmlm.train import loop, trial

RUN = {"use_cpu": True, "max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 3, "save_steps": 100}


def interrupt(owner: object, name: str, call: int):
    "Raise as a second Ctrl-C does, after a call of a function."
    original, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        result = original(*args, **options)
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    return patch.object(owner, name, interrupted)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory):
    "The model of an undisturbed run."
    task = tiny_run(tmp_path_factory.mktemp("complete"), **RUN)
    task.train()
    return task.model


@pytest.mark.parametrize("call", [1, 2, 6, 7])  # Of the backward pass: in both micro-batches of a step, and later
def test_gradients_of_an_interrupted_step_do_not_count(tmp_path: Path, complete, call: int):
    task = tiny_run(tmp_path, **RUN)
    with interrupt(type(task.accelerator), "backward", call), pytest.raises(KeyboardInterrupt):
        task.train()
    assert task.state.step == (call - 1) // 2 and any(weight.grad is not None for weight in task.model.parameters())
    task.train()
    assert same_weights(task.model, complete)


def test_a_step_that_was_interrupted_in_its_update(tmp_path: Path, complete):
    "The weights may be those of half a step: an error, and a new task continues from the latest checkpoint."
    task = tiny_run(tmp_path, **RUN | {"save_steps": 2})
    with interrupt(loop, "step_if_finite", 4), pytest.raises(KeyboardInterrupt):
        task.train()
    assert task.state.step == 3
    for _ in range(2):
        with pytest.raises(RuntimeError, match="step 4 was interrupted while it updated the weights; the latest checkpoint is .*: create"):
            task.train()
    resumed = tasks.create_mlm(tmp_path / "tokenizer", tmp_path / "dataset", checkpoint_path=tmp_path / "run")
    resumed.train()
    assert same_weights(resumed.model, complete)


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path, complete):
    "In the same folder, as its job script does after a kill; its log is kept under another name."
    with interrupt(loop, "train_step", 5), pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, **RUN).train()
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"step": 3' in log and not list((tmp_path / "run").glob("checkpoint-*"))
    again = tiny_run(tmp_path, **RUN)
    again.train()
    assert same_weights(again.model, complete)
    assert (tmp_path / "run" / "superseded-log.jsonl").read_text() == log
    assert not (tmp_path / "run" / "superseded-log.jsonl-2").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_measuring_is_no_update(tmp_path: Path, complete):
    "`estimate` takes steps and undoes them, also between two sessions."
    task = tiny_run(tmp_path, **RUN)
    task.train(stop_at_step=2)
    task.estimate()
    with interrupt(trial, "train_step", 2), pytest.raises(KeyboardInterrupt):
        task.estimate()
    task.train()
    assert same_weights(task.model, complete)
