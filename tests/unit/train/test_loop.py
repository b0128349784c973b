"The training loop: what a step computes, what a run logs, how it resumes, and how it ends."

import ast
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import same_weights
import torch

import langmlm
from langmlm import tasks
from langmlm.data.masking import BatchSizes, fixed_sizes
from langmlm.disk import LOCK, read_json
from langmlm.folders import list_checkpoints
from langmlm.testing import tiny_run
from langmlm.train.loop import fit, train_step
from langmlm.train.optim import learning_rate_at
from langmlm.train.metrics import Estimate

PACKAGE = Path(langmlm.__file__).parent
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def start_run(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tasks.MLMTask]:
    "Create a run, in a folder of its own unless it is given."

    def create(checkpoint_path: Path | None = None, model_config: dict = {}, **changes) -> tasks.MLMTask:
        settings = {"output_dir": tmp_path_factory.mktemp("loop") / "run", **changes}
        if checkpoint_path is None:
            settings = {"max_steps": 24, "logging_steps": 4, "save_steps": 8, **settings}
        parts = {"model_config": model_config, "checkpoint_path": checkpoint_path}
        return tiny_run(data["tokenizer"].parent, **parts, **settings)

    return create


@pytest.fixture(scope="module")
def straight(start_run: Callable) -> tasks.MLMTask:
    "A run of 24 steps, without interruption."
    run = start_run()
    run.train()
    return run


def entries(run: tasks.MLMTask, *names: str) -> list[tuple]:
    "The logged values of some names."
    return [tuple(entry[name] for name in names) for entry in run.state.log_history if "loss" in entry]


def losses(run: tasks.MLMTask) -> list[float]:
    "The logged losses."
    return [loss for (loss,) in entries(run, "loss")]


def do_step(run: tasks.MLMTask, step: int = 0, learning_rate: float = 0.0, **changes) -> list[float]:
    "Do a step: loss sum, predictions and gradient norm."
    run.module.train()
    config = replace(run.config, **changes)
    batches = run.loader.load(step)
    return train_step(run.module, run.optimizer, run.accelerator, batches, step, learning_rate, config).tolist()


# A step


def test_step(start_run: Callable):
    "Without a learning rate the weights stay; with one they change; random weights know as much as any guess."
    run = start_run()
    before = run.model.lm_head.dense.weight.clone()
    loss_sum, predictions, grad_norm = do_step(run)
    assert torch.equal(run.model.lm_head.dense.weight, before) and 0 < grad_norm < math.inf
    assert predictions == run.loader.load(0).predictions
    # Measured with ten seeds: within 0.03 of ln(vocabulary)
    assert loss_sum / predictions == pytest.approx(math.log(run.model.config.vocab_size), abs=0.3)
    assert all(weight.grad is None for weight in run.model.parameters())
    do_step(run, 1, 1e-3)
    assert not torch.equal(run.model.lm_head.dense.weight, before)
    assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3}


def test_dropout_depends_on_seed_and_step_only(start_run: Callable):
    "Not on what was drawn before; each micro-batch of a step has its own."
    run = start_run(gradient_accumulation_steps=2)
    first = do_step(run)
    torch.manual_seed(7)
    torch.rand(5)
    assert do_step(run) == first
    assert do_step(run, seed=43)[0] != first[0] and do_step(run, 1)[0] != first[0]
    batches = run.loader.load(0)
    arguments = run.module, run.optimizer, run.accelerator
    later = train_step(*arguments, batches, 1, 0.0, run.config).tolist()  # The same data as another step
    assert later[0] != first[0] and later[1] == first[1]
    (_, batch), _ = batches.batches
    for index in (0, 1):  # The same data as another micro-batch
        alone = replace(batches, batches=[(index, batch)], predictions=len(batch.labels))
        later = [*later, train_step(*arguments, alone, 0, 0.0, run.config).tolist()[0]]
    assert later[-1] != later[-2]
    run.module.eval()
    assert (
        train_step(*arguments, batches, 0, 0.0, run.config).tolist()
        == train_step(*arguments, batches, 9, 0.0, run.config).tolist()
    )


def test_clipping(start_run: Callable):
    "The norm is measured before it is clipped; 0 disables clipping."
    one, two = start_run(model_config=NO_DROPOUT), start_run(model_config=NO_DROPOUT)
    norm = do_step(one, learning_rate=0.0)[2]
    for clip in (0, 10 * norm, norm / 10):
        assert do_step(two, max_grad_norm=float(clip))[2] == pytest.approx(norm, rel=1e-6)
    gradients = {}

    def look(optimizer, arguments, options) -> None:
        gradients[limit] = torch.cat(
            [weight.grad.flatten() for group in optimizer.param_groups for weight in group["params"]]
        )

    hook = two.optimizer.optimizer.register_step_pre_hook(look)
    for limit in (0.0, norm / 10):
        do_step(two, max_grad_norm=limit)
    hook.remove()
    assert gradients[0.0].norm().item() == pytest.approx(norm, rel=1e-4)
    assert gradients[norm / 10].norm().item() == pytest.approx(norm / 10, rel=1e-3)


def test_steps_with_nan_do_not_change_the_weights(start_run: Callable):
    "Their gradients are not applied, and the metrics show them."
    run = start_run()
    with torch.no_grad():
        run.model.lm_head.bias[5] = torch.nan
    before = run.model.lm_head.dense.weight.clone()
    loss_sum, _, grad_norm = do_step(run, learning_rate=1e-3)
    assert math.isnan(loss_sum) and math.isnan(grad_norm)
    assert torch.equal(run.model.lm_head.dense.weight, before)


def test_gradients_zeroed_in_place(start_run: Callable, straight: tasks.MLMTask):
    "As captured CUDA graphs need it: the result is the same (measured: to the bit), and the tensors remain."
    run = start_run()
    parts = {name: getattr(run, name) for name in ("model", "module", "optimizer", "accelerator", "loader")}
    fit(**parts, validation=None, run_folder=run.run_folder, state=run.state, config=run.config, set_to_none=False)
    assert all(not weight.grad.any() for weight in run.model.parameters())
    assert losses(run) == pytest.approx(losses(straight), abs=1e-4)


def test_gradient_accumulation(start_run: Callable):
    "Four micro-batches of one sequence are one of four; measured: weights equal to 2e-7 after four steps."

    def train(**changes) -> tasks.MLMTask:
        run = start_run(model_config=NO_DROPOUT, packing=False, max_steps=4, save_strategy="no", **changes)
        run.train()
        return run

    together = train(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    one_by_one = train(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    weights = one_by_one.model.state_dict()
    difference = max((value - weights[name]).abs().max().item() for name, value in together.model.state_dict().items())
    assert difference < 1e-5
    assert losses(one_by_one) == pytest.approx(losses(together), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [  # Measured on a CPU: differences of 0, 0 and 2.5e-4
        ({"gradient_checkpointing": True}, 1e-5),
        ({"optim": "adamw_torch"}, 1e-5),
        ({"bf16": True}, 0.05),
    ],
)
def test_same_losses(start_run: Callable, changes: dict, tolerance: float):
    "Ways to save memory or time, which do not change what is learned."
    plain, run = start_run(max_steps=5, logging_steps=1), start_run(max_steps=5, logging_steps=1, **changes)
    plain.train()
    run.train()
    assert losses(run) == pytest.approx(losses(plain), abs=tolerance)


def test_padded_shapes(start_run: Callable, straight: tasks.MLMTask):
    "Few shapes or one give the losses of none, to rounding, and the log says how much was padded."
    shares = []
    options = straight.dataset.lengths, straight.loader.plan.token_budget, straight.config.mlm_probability
    for sizes in (BatchSizes(), fixed_sizes(*options)):
        run = start_run(model_config={})
        run.loader = replace(run.loader, sizes=sizes)
        run.train()
        # Measured: 1e-7
        assert losses(run) == pytest.approx(losses(straight), abs=1e-4)
        shares.append(run.state.log_history[-1]["padding_share"])
    assert 0 < shares[0] <= shares[1] < 1 and straight.state.log_history[-1]["padding_share"] == 0


# A run


def test_log(straight: tasks.MLMTask):
    "Mean losses, the learning rates of the schedule, and speed; the loss falls."
    plan, config = straight.loader.plan, straight.config
    assert entries(straight, "step") == [(step,) for step in range(4, 25, 4)]
    warmup = math.ceil(config.warmup_ratio * plan.total_steps)
    for step, rate in entries(straight, "step", "learning_rate"):
        assert rate == learning_rate_at(step - 1, plan.total_steps, warmup, config.learning_rate, "linear")
    for step, epoch in entries(straight, "step", "epoch"):
        assert epoch == pytest.approx(plan.epochs_done(step), abs=1e-3)
    assert losses(straight)[-1] < losses(straight)[0] - 0.1  # Measured with five seeds: it falls by 0.2 to 0.3
    entry = straight.state.log_history[-1]
    assert entry["tokens_per_second"] > 0 and entry["mfu"] > 0 and entry["memory_gb"] > 0
    assert entry["padding_share"] == 0.0 and 0 <= entry["data_wait_share"] < 1
    assert read_json(config.run_folder / "trainer_state.json")["log_history"] == straight.state.log_history


def test_loss_is_the_mean_over_predictions(start_run: Callable):
    "Entries over several steps weight each step by its predictions."
    fine, coarse = start_run(logging_steps=1, max_steps=6), start_run(logging_steps=6, max_steps=6)
    fine.train()
    coarse.train()
    predictions = [fine.loader.load(step).predictions for step in range(6)]
    mean = sum(loss * count for loss, count in zip(losses(fine), predictions)) / sum(predictions)
    assert losses(coarse) == [pytest.approx(mean, rel=1e-6)]
    assert entries(coarse, "grad_norm") == entries(fine, "grad_norm")[-1:]


def test_files(straight: tasks.MLMTask):
    "Checkpoints, the final model, the log, and the lock that is free."
    names = sorted(path.name for path in straight.config.run_folder.iterdir())
    assert names == [LOCK, "checkpoint-16", "checkpoint-24", "checkpoint-8", "final_model", "log.jsonl", "trainer_state.json"]


@pytest.mark.parametrize("step", [1, 3, 4, 11, 16, 23])
def test_resumed_run(start_run: Callable, straight: tasks.MLMTask, step: int):
    "Weights and log are those of an uninterrupted run, wherever it was interrupted."
    stopped = start_run()
    history = stopped.train(stop_at_step=step)
    assert stopped.state.step == step and history.log_history is stopped.state.log_history
    assert list_checkpoints(stopped.config.run_folder)[-1].name == f"checkpoint-{step}"
    assert not (stopped.config.run_folder / "final_model").exists()
    resumed = start_run(checkpoint_path=stopped.config.run_folder, output_dir=stopped.config.run_folder)
    assert resumed.state.step == step
    resumed.train()
    assert same_weights(resumed, straight)
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    assert entries(resumed, *kept) == entries(straight, *kept)


def test_sessions_of_one_object(start_run: Callable, straight: tasks.MLMTask):
    "`train` may be called again; after the last step it changes nothing."
    run = start_run()
    for step in (5, 5, 3, 9, 100):
        run.train(stop_at_step=step)
    assert run.state.step == 24 and same_weights(run, straight)
    before = len(run.state.log_history)
    run.train()
    assert same_weights(run, straight) and len(run.state.log_history) == before


def test_another_learning_rate(start_run: Callable, straight: tasks.MLMTask):
    "A resumed run may have another one; the schedule continues at the same step."
    rates = dict(entries(straight, "step", "learning_rate"))
    folder = straight.config.run_folder
    slower = start_run(checkpoint_path=folder / "checkpoint-8", learning_rate=1e-3)
    slower.train()
    for step, rate in entries(slower, "step", "learning_rate"):
        assert rate == (rates[step] if step <= 8 else pytest.approx(rates[step] / 2, rel=1e-12))
    assert losses(slower)[:2] == losses(straight)[:2] and losses(slower)[3:] != losses(straight)[3:]
    for changes, message in (
        ({"seed": 7}, "seed: then 42, now 7"),
        ({"max_steps": 5}, "raise num_train_epochs or max_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            start_run(checkpoint_path=folder / "checkpoint-8", **changes)


def test_random_generators_of_the_user(start_run: Callable):
    "A run leaves them as they were."
    run = start_run(max_steps=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run.train()
    assert torch.equal(torch.rand(3), expected)


def test_messages(start_run: Callable, caplog: pytest.LogCaptureFixture):
    "One line for the size of the run, one per log entry, one per checkpoint, one for the session."
    caplog.set_level(logging.INFO, "langmlm")
    start_run().train()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    steps = [message for message in messages if message.startswith("step ")]
    assert [message.split(":")[0] for message in steps] == [f"step {step} of 24" for step in range(4, 25, 4)]
    assert all("loss " in message and "learning rate " in message and " tokens/s" in message for message in steps)
    left = [bool(re.search(r"tokens/s, about [\dh ]+ (min|s) left$", message)) for message in steps]
    assert left == [True] * (len(steps) - 1) + [False]
    assert sum(message.startswith("saved ") for message in messages) == 4
    assert sum("tokens" in message and not message.startswith("step ") for message in messages) >= 2


# Losses that are not finite


def poisoned_run(start_run: Callable, on_loss_spike: str, **changes) -> tasks.MLMTask:
    "A run that begins with a weight of NaN."
    run = start_run(on_loss_spike=on_loss_spike, **changes)
    with torch.no_grad():
        run.model.lm_head.bias[5] = torch.nan
    return run


def test_poisoned_run_recovers(start_run: Callable, straight: tasks.MLMTask):
    "It is rolled back to its initial weights after the first step, and ends as well as an undisturbed run."
    run = poisoned_run(start_run, "rollback")
    history = run.train().log_history
    assert history[0]["step"] == 1 and history[0]["rollback"]["to_step"] == 0
    assert history[0]["rollback"]["skipped_steps"] == 1 and sum("rollback" in entry for entry in history) == 1
    assert [path.name for path in list_checkpoints(run.config.run_folder)][0] == "checkpoint-1"  # Of the rollback
    rates, expected = dict(entries(run, "step", "learning_rate")), dict(entries(straight, "step", "learning_rate"))
    assert all(rates[step] == pytest.approx(expected[step] / 2) for step in rates)
    # Half the learning rate; measured with five seeds: 0.12 to 0.16 above the undisturbed run
    assert losses(run)[-1] == pytest.approx(losses(straight)[-1], abs=0.3)
    assert all(weight.isfinite().all() for weight in run.model.state_dict().values())


@pytest.mark.parametrize("on_loss_spike", ["ignore", "warn"])
def test_poisoned_run_ends(start_run: Callable, on_loss_spike: str):
    "Without rollbacks nothing helps: the error says what to do, and nothing is saved."
    run = poisoned_run(start_run, on_loss_spike)
    message = (
        r"the loss of step 1 is nan and its gradient norm nan: start a new run with learning_rate=0.001 \(it was 0.002\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    assert run.state.step == 1 and [path.name for path in run.config.run_folder.iterdir()] == [LOCK]


def test_poisoned_again_and_again(start_run: Callable, monkeypatch: pytest.MonkeyPatch):
    "After `max_rollbacks` the run ends with an error."
    run = poisoned_run(start_run, "rollback", max_rollbacks=2)
    original = langmlm.train.loop.train_step

    def poison(module, *rest):
        with torch.no_grad():
            run.model.lm_head.bias[5] = torch.nan
        return original(module, *rest)

    monkeypatch.setattr("langmlm.train.loop.train_step", poison)
    with pytest.raises(FloatingPointError, match="diverged again, and max_rollbacks=2 is reached"):
        run.train()
    rollbacks = [entry["rollback"] for entry in run.state.log_history if "rollback" in entry]
    assert [entry["learning_rate_factor"] for entry in rollbacks] == [0.5, 0.25]


def test_rollback_without_checkpoints(start_run: Callable):
    "With `save_strategy='no'`, nothing is saved after a rollback either."
    run = poisoned_run(start_run, "rollback", save_strategy="no")
    run.train()
    assert list_checkpoints(run.config.run_folder) == [] and (run.config.run_folder / "final_model").is_dir()


# The estimate


@pytest.mark.parametrize("begun", [0, 5])
def test_estimate_leaves_the_run_unchanged(start_run: Callable, straight: tasks.MLMTask, begun: int):
    "Weights, optimizer, log, files and random numbers; the run ends as one that was not measured."
    run = start_run()
    if begun:
        run.train(stop_at_step=begun)
    log, generator = list(run.state.log_history), torch.get_rng_state()
    estimate = run.estimate()
    assert isinstance(estimate, Estimate) and estimate.seconds > 0
    assert (run.state.step, estimate.steps_left) == (begun, 24 - begun)
    assert run.state.log_history == log and torch.equal(torch.get_rng_state(), generator)
    assert run.config.run_folder.exists() == bool(begun)
    run.train()
    assert same_weights(run, straight) and losses(run) == losses(straight)
    assert run.estimate().steps_left == 0


def test_estimate_of_few_steps(start_run: Callable):
    "Fewer steps than it wants to measure, or none, are no problem; less than one is an error."
    run = start_run(max_steps=2)
    assert run.estimate(steps=10).steps_left == 2
    run.train()
    assert run.estimate(steps=1).seconds == 0
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
            run.estimate(steps=steps)


# Private APIs of other libraries

PRIVATE = {  # What the modules of training, data and disks use; each has a test, named here
    "data/dataset.py": {"rows._indices"},  # test_dataset.py::test_a_selection_of_rows
    "train/launch.py": {"AcceleratorState._reset_state"},  # test_launch.py::test_private_api_of_accelerate
    "train/optim.py": {"torch.cpu._is_amx_tile_supported", "torch.cpu._is_avx512_bf16_supported"},  # test_optim.py
    "train/trial.py": {"torch.utils._python_dispatch: _python_dispatch"},  # test_trial.py::test_tensors_are_counted_...
}


def test_private_apis():
    "Every use of a private attribute of another library is listed here, so that it can be tested."
    found = {}
    for folder in ("train", "data"):
        for file in (PACKAGE / folder).glob("*.py"):
            found[f"{folder}/{file.name}"] = private_attributes(file)
    for name in ("disk.py", "config.py", "progress.py", "tasks.py", "testing.py"):
        found[name] = private_attributes(PACKAGE / name)
    assert {name: attributes for name, attributes in found.items() if attributes} == PRIVATE


def private_attributes(file: Path) -> set[str]:
    "Attributes with a leading underscore that a module takes from other objects than its own, and private imports."
    tree, private = ast.parse(file.read_text(encoding="utf-8")), set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr not in own:
                private.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private |= {f"{node.module}: {part}" for part in parts if part.startswith("_") and part != "__version__"}
    return private


def test_accelerate_wraps_the_optimizer(straight: tasks.MLMTask):
    "The loop finds the wrapped optimizer and the loss scale by name; the wrapped model is the one that is saved."
    assert isinstance(straight.optimizer.optimizer, torch.optim.Optimizer)
    assert straight.accelerator.scaler is None
    assert straight.accelerator.unwrap_model(straight.module).model is straight.model


# Short lines


def test_short_lines_resume_exactly(tmp_path: Path):
    "With limited packing, the peak learning rate is higher than configured, and a resumed run has the same weights."
    options = {"documents": 200, "tokenizer_config": {"max_length": 256}, "max_steps": 8, "logging_steps": 1}
    straight, stopped = (tiny_run(tmp_path, **options, output_dir=tmp_path / name) for name in ("straight", "stopped"))
    assert straight.loader.plan.packing_ratio == 4
    straight.train()
    stopped.train(stop_at_step=3)
    resumed = tiny_run(tmp_path, checkpoint_path=tmp_path / "stopped")
    resumed.train()
    assert same_weights(straight, resumed)
    (rates,) = zip(*entries(straight, "learning_rate"))
    assert max(rates) == straight.arithmetic().learning_rate == pytest.approx(2**1.5 * straight.config.learning_rate)
