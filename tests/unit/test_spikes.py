"Runs that derail in every way come back, and end about as well as one that did not."

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import healthy_runs
import pytest
import torch
from test_processes import train_in_processes

from langmlm import tasks
from langmlm.train import loop as training
from langmlm.train.checkpoint import list_checkpoints, step_of
from langmlm.text.corpus import docstrings

SETTINGS = {
    "max_steps": 200,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "logging_steps": 5,
    "save_steps": 10,
    "bf16": False,
}
ARCHITECTURE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
CORRUPT = range(140, 154)  # Steps whose data is garbage, where some are
POISONED = 150  # The step before which a weight becomes no number, where one does


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "Arguments of `create_mlm`: so little text that a model learns much of it by heart, and a model that has begun to."
    folder = tmp_path_factory.mktemp("learnable")
    (folder / "data.txt").write_text("\n".join(islice(docstrings(), 12)), encoding="utf-8")
    paths = {"path_to_save_tokenizer": folder / "tokenizer", "path_to_save_dataset": folder / "dataset"}
    tasks.create_tokenizer(folder / "data.txt", {"vocab_size": 300, "max_length": 64, **paths}).train()
    data = {"tokenizer": folder / "tokenizer", "tokenized_dataset": folder / "dataset"}
    settings = {**SETTINGS, "max_steps": 300, "save_strategy": "no", "output_dir": folder / "begun"}
    tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings).train()
    return {**data, "checkpoint_path": folder / "begun" / "final_model"}


@pytest.fixture
def train(learnable: dict, tmp_path: Path) -> Callable[..., tasks.MLMTask]:
    "Train that model further."

    def train_run(name: str = "run", **changes) -> tasks.MLMTask:
        task = tasks.create_mlm(**learnable, training_config={**SETTINGS, "output_dir": tmp_path / name, **changes})
        task.train()
        return task

    return train_run


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    "Have something done to run and data before every step."
    take_step = training.take_step

    def spoil_steps(before: Callable) -> None:
        def spoilt(run, data, rate) -> None:
            take_step(run, before(run, data) or data, rate)

        monkeypatch.setattr(training, "take_step", spoilt)

    return spoil_steps


def corrupt(run, data, steps: range = CORRUPT) -> training.StepData | None:
    "Answers that have nothing to do with the text, in some steps."
    if run.step not in steps:
        return None
    draw = torch.Generator().manual_seed(run.step)
    batches = [
        (number, replace(batch, labels=torch.randint(5, 300, batch.labels.shape, generator=draw)))
        for number, batch in data.batches
    ]
    return replace(data, batches=batches)


def overflow(run, data) -> None:
    "One batch in which activations overflow."
    if run.step == CORRUPT[0]:
        embeddings = run.stock.roberta.embeddings
        hook = embeddings.register_forward_hook(lambda module, inputs, output: (hook.remove(), output * torch.inf)[1])


def poison(run, data) -> None:
    "A weight that becomes no number, once."
    if run.step == POISONED and not run.rollbacks:
        with torch.no_grad():
            run.stock.roberta.encoder.layer[0].output.dense.weight[3, 5] = torch.nan


def last_loss(task: tasks.MLMTask) -> float:
    "The mean of the last five entries."
    losses = [entry["loss"] for entry in task.run.history.log_history if "loss" in entry]
    return sum(losses[-5:]) / 5


def rollbacks(task: tasks.MLMTask) -> list[dict]:
    "The entries of the log that say that the run went back."
    return [entry for entry in task.run.history.log_history if "rollback" in entry]


@pytest.fixture(scope="module")
def clean_loss(learnable: dict, tmp_path_factory: pytest.TempPathFactory) -> float:
    "Where a run ends that nothing happens to."
    folder = tmp_path_factory.mktemp("clean") / "run"
    task = tasks.create_mlm(**learnable, training_config={**SETTINGS, "output_dir": folder})
    task.train()
    assert not rollbacks(task)
    return last_loss(task)


def test_learning_rate_far_too_high(train, clean_loss: float):
    "32 times what is good: spoilt at once without help, and well with it."
    task = train(learning_rate=32 * SETTINGS["learning_rate"])
    assert 1 <= len(rollbacks(task)) <= 5
    assert last_loss(task) < 1.05 * clean_loss
    spoilt = train("ignored", learning_rate=32 * SETTINGS["learning_rate"], on_loss_spike="ignore")
    assert last_loss(spoilt) > 1.5 * clean_loss


@pytest.mark.parametrize("accident", [corrupt, overflow, poison])
def test_accidents(train, spoil, clean_loss: float, accident: Callable):
    "One way back, to a checkpoint from before, and an end as good as without."
    spoil(accident)
    task = train()
    (entry,) = rollbacks(task)
    assert 120 <= entry["rollback"]["to_step"] <= 140 and entry["step"] <= CORRUPT[-1] + 5
    assert task.run.learning_rate_factor == 0.5
    assert last_loss(task) < 1.05 * clean_loss
    assert all(weight.isfinite().all() for weight in task.run.stock.state_dict().values())


def test_one_bad_batch_is_no_spike(train, spoil):
    "Three steps of garbage pass by."
    spoil(lambda run, data: corrupt(run, data, CORRUPT[:3]))
    assert not rollbacks(train(max_steps=160))


def test_stopped_at_every_step(learnable: dict, train, spoil, tmp_path: Path):
    "A run that goes back twice, for garbage and for a poisoned weight, in sessions of one step: the same weights and log."

    def both(run, data):
        if run.step == 20 and not run.rollbacks:
            run.stock.lm_head.bias.data[7] = torch.nan
        return corrupt(run, data, range(40, 54))

    settings = {"max_steps": 64, "logging_steps": 3, "save_steps": 8, "save_total_limit": 1}
    spoil(both)
    straight = train("straight", **settings)
    assert [entry["rollback"]["to_step"] for entry in rollbacks(straight)] == [0, 21]
    settings = {**SETTINGS, **settings, "output_dir": tmp_path / "stopped"}
    task = tasks.create_mlm(**learnable, training_config=settings)
    task.train(stop_at_step=1)
    data = {name: path for name, path in learnable.items() if name != "checkpoint_path"}
    while task.run.step < 64:
        task = tasks.create_mlm(**data, checkpoint_path=tmp_path / "stopped")
        task.train(stop_at_step=task.run.step + 1)
    expected = straight.run.stock.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in task.run.stock.state_dict().items())
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm", "rollback")
    logs = [each.run.history.log_history for each in (task, straight)]
    stopped, expected = ([{name: entry.get(name) for name in kept} for entry in log] for log in logs)
    assert stopped == expected


def test_gives_up(learnable: dict, train, tmp_path: Path):
    "After `max_rollbacks` the run stops; what it leaves can go on with a lower learning rate, which counts anew."
    with pytest.raises(FloatingPointError, match="went back max_rollbacks=0 times"):
        train(learning_rate=0.016, max_rollbacks=0)
    left = list_checkpoints(tmp_path / "run")[-1]
    data = {name: path for name, path in learnable.items() if name != "checkpoint_path"}
    task = tasks.create_mlm(**data, checkpoint_path=tmp_path / "run", training_config={"learning_rate": 1e-3})
    assert task.run.step == step_of(left) and (task.run.rollbacks, task.run.learning_rate_factor) == (0, 1.0)
    task.train()
    assert not rollbacks(task)


def test_two_processes_go_back_together(data, tmp_path: Path):
    "Each of two processes finds what one finds alone: the same ways back, at the same steps."
    found = []
    for number in (1, 2):
        settings = {"max_steps": 40, "learning_rate": 5.0, "gradient_accumulation_steps": 2 // number, "use_cpu": True}
        given = {name: str(path) for name, path in data.items()} | {"model_config": ARCHITECTURE}
        given["training_config"] = SETTINGS | settings | {"output_dir": str(tmp_path / f"run-{number}")}
        log = train_in_processes(number, given)
        found.append([(entry["step"], entry["rollback"]["to_step"]) for entry in log if "rollback" in entry])
    assert found[0] and found[0] == found[1]


def test_warning_changes_nothing(train, caplog: pytest.LogCaptureFixture):
    "The weights are those of a run that ignores it; log and warning say what to do."
    settings = {"learning_rate": 0.064, "max_steps": 40, "warmup_steps": 15}
    runs = [train(answer, on_loss_spike=answer, **settings) for answer in ("warn", "ignore")]
    warned, ignored = (task.run.stock.state_dict() for task in runs)
    assert all(torch.equal(weight, ignored[name]) for name, weight in warned.items())
    events = [entry for task in runs for entry in task.run.history.log_history if "loss_spike" in entry]
    assert len(events) == 1 and "learning_rate=0.032 (it was 0.064)" in caplog.text


@pytest.mark.parametrize("number", [0, 7, 13])
def test_no_false_alarm(tmp_path: Path, number: int):
    "Some of the healthy runs of `benchmarks/healthy_runs.py`, shortened."
    assert healthy_runs.train(number, tmp_path, max_steps=100)["alarms"] == 0
