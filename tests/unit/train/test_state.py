"The state of a run is saved and restored whole; a run that differs in what it depends on cannot be resumed."

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import accelerate
import pytest
import torch
import transformers

from langmlm import tasks
from langmlm.testing import tiny_run
from langmlm.train.checkpoint import find_starting_point
from langmlm.train.config import TrainingConfig
from langmlm.train.sharding import gather_run
from langmlm.train.state import TrainState, describe_run, keep_global_batch, make_trainer_state, restore_state

LOSS_HISTORY = 256  # Latest steps whose losses are remembered

ALONE = SimpleNamespace(reduce=lambda tensor: tensor)  # The only part of an Accelerator that metrics need


def read(*metrics: list[float], **fields) -> TrainState:
    "A state that has done some steps and read their metrics."
    state = TrainState(**fields)
    for values in metrics:
        state.add(torch.tensor(values))
    state.read_metrics(ALONE)
    return state


def test_metrics():
    "Loss sum, predictions and gradient norm by step; steps without predictions have no loss."
    state = read([70.0, 10.0, 1.5], [0.0, 0.0, 0.0], [130.0, 20.0, 1.25])
    assert state.step == 3
    assert state.unlogged == [[1, 70, 10, 1.5], [2, 0, 0, 0], [3, 130, 20, 1.25]]
    assert state.recent_losses() == [[1, 7.0], [3, 6.5]]


def test_metrics_are_read_once():
    "Pending steps are not counted as read; the numbers of later steps are right; all are read in one reduction."
    reduced = []
    accelerator = SimpleNamespace(reduce=lambda tensor: reduced.append(tensor.shape) or tensor)
    state = TrainState(step=10)
    state.add(torch.tensor([70.0, 10.0, 1.5]))
    state.add(torch.tensor([60.0, 10.0, 1.5]))
    assert state.unlogged == [] == state.recent_losses() and state.step == 12
    state.read_metrics(accelerator)
    state.read_metrics(accelerator)
    assert reduced == [(2,)] and not state.pending
    state.add(torch.tensor([50.0, 10.0, 1.5]))
    assert [step for step, *_ in state.unlogged] == [11, 12]
    state.read_metrics(accelerator)
    assert state.recent_losses() == [[11, 7.0], [12, 6.0], [13, 5.0]]


def test_metrics_of_several_processes():
    "Loss sums are added over all processes; predictions and gradient norm are the same in all."
    state = TrainState()
    state.add(torch.tensor([70.0, 20.0, 1.5]))
    state.read_metrics(SimpleNamespace(reduce=lambda tensor: tensor + 60))  # As if another process had 60
    assert state.unlogged == [[1, 130, 20, 1.5]] and state.recent_losses() == [[1, 6.5]]


def test_non_finite_on_cpu():
    "Only the latest gradient norm counts, and only where reading it costs nothing."
    state = TrainState()
    for norm, expected in ((1.0, False), (math.inf, True), (2.0, False), (math.nan, True)):
        state.add(torch.tensor([70.0, 10.0, norm]))
        assert state.is_non_finite_on_cpu() is expected or bool(state.is_non_finite_on_cpu()) is expected
    state.add(torch.empty(3, device="meta"))  # Like a GPU: not readable at once
    assert state.is_non_finite_on_cpu() is False


def test_mark_logged():
    "An entry covers the steps since the last one; their losses stay in memory, and only the latest."
    state = read(*([10.0 * loss, 10.0, 1.0] for loss in range(1, 6)))
    assert [step for step, *_ in state.unlogged] == [1, 2, 3, 4, 5] and state.losses == []
    state.mark_logged()
    assert state.unlogged == [] == state.log_history
    assert state.losses == [[step, float(step)] for step in range(1, 6)] == state.recent_losses()
    for _ in range(LOSS_HISTORY):
        state.add(torch.tensor([70.0, 10.0, 1.0]))
    state.read_metrics(ALONE)
    assert len(state.recent_losses()) == LOSS_HISTORY == state.history_length and state.recent_losses()[0] == [6, 7.0]
    state.mark_logged()
    assert len(state.losses) == LOSS_HISTORY


# Resuming


@pytest.fixture(scope="module")
def start_run(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tasks.MLMTask]:
    "Create a run on the small dataset."

    def create(checkpoint_path: Path | None = None, **changes) -> tasks.MLMTask:
        settings = {"output_dir": tmp_path_factory.mktemp("state") / "run", **changes}
        return tiny_run(data["tokenizer"].parent, checkpoint_path=checkpoint_path, **settings)

    return create


@pytest.fixture(scope="module")
def run(start_run: Callable) -> tasks.MLMTask:
    "A run that was rolled back once, and has three steps that are not logged."
    run = start_run()
    state = run.state
    state.step, state.losses, state.rollbacks, state.learning_rate_factor = 4, [[3, 6.875], [4, 6.75]], 1, 0.5
    state.log_history.append({"step": 4, "loss": 6.8125})
    for metrics in ([70.0, 10.0, 1.5], [0.0, 0.0, 0.0], [130.0, 20.0, 1.25]):
        state.add(torch.tensor(metrics))
    state.read_metrics(run.accelerator)
    return run


@pytest.fixture(scope="module")
def checkpoint(run: tasks.MLMTask) -> Path:
    "A checkpoint of that run."
    run.run_folder.save(*gather_run(run.model, run.optimizer), run.state)
    return run.config.run_folder / "checkpoint-7"


def trainer_state_of(run: tasks.MLMTask, state: TrainState | None = None, **changes) -> dict:
    "What a checkpoint of a run says about its state, or about another one."
    parts = {"description": run.run_folder.description, "plan": run.loader.plan, "accelerator": run.accelerator}
    return make_trainer_state(run.state if state is None else state, **parts | changes)


def test_saved_state(run: tasks.MLMTask):
    "JSON, with everything that later steps depend on; metrics that are not read must be, first."
    state = read([70.0, 10.0, math.inf], losses=[[1, 7.5]], rollbacks=2, learning_rate_factor=0.25)
    saved = json.loads(json.dumps(trainer_state_of(run, state)))["langmlm"]["state"]
    assert saved["unlogged"] == [[1, 70.0, 10.0, math.inf]] and saved["losses"] == [[1, 7.5]]
    assert (saved["rollbacks"], saved["learning_rate_factor"], saved["initial_weights"]) == (2, 0.25, None)
    state.add(torch.tensor([70.0, 10.0, 1.0]))
    with pytest.raises(RuntimeError, match="read_metrics must be called before the state is saved"):
        trainer_state_of(run, state)


def test_trainer_state(run: tasks.MLMTask, checkpoint: Path):
    "The fields that other tools read, and what the run depends on."
    plan = run.loader.plan
    trainer_state = find_starting_point(checkpoint).trainer_state
    assert trainer_state == json.loads(json.dumps(trainer_state_of(run)))
    assert (trainer_state["global_step"], trainer_state["max_steps"]) == (7, plan.total_steps)
    assert trainer_state["epoch"] == pytest.approx(plan.epochs_done(7), abs=1e-3)
    assert trainer_state["log_history"] == [{"step": 4, "loss": 6.8125}]
    saved = trainer_state["langmlm"]
    assert saved["identity"]["gradient_accumulation_steps x processes"] == 1 and saved["scaler"] is None
    assert saved["environment"]["precision"] == "no" and saved["config"]["learning_rate"] == 2e-3
    assert json.loads(json.dumps(trainer_state_of(run)))["langmlm"]["state"]["rollbacks"] == 1


def identity_parts(run: tasks.MLMTask) -> tuple:
    "Everything that `describe_run` takes, except the accelerator."
    loader = run.loader
    return run.model.config, run.dataset, run.tokenizer, run.config, loader.plan, loader.mask_name


def describe(run: tasks.MLMTask) -> dict[str, dict]:
    "Describe a run anew."
    return describe_run(*identity_parts(run), run.accelerator)


def test_environment(run: tasks.MLMTask):
    "What decides how numbers are rounded."
    environment = describe(run)["environment"]
    assert environment["torch"] == torch.__version__ and environment["accelerate"] == accelerate.__version__
    assert environment["transformers"] == transformers.__version__
    assert (environment["device"], environment["processes"], environment["threads"]) == (
        "cpu",
        1,
        torch.get_num_threads(),
    )


def test_state_survives_a_checkpoint(start_run: Callable, run: tasks.MLMTask, checkpoint: Path):
    "Everything is restored, in the types that it had."
    resumed = start_run(checkpoint)
    assert resumed.state.step == 7 and resumed.state.log_history == run.state.log_history
    assert resumed.state == run.state
    assert resumed.state.losses == [[3, 6.875], [4, 6.75]] and type(resumed.state.losses[0]) is list
    assert [list(map(type, metrics)) for metrics in resumed.state.unlogged] == [[int, float, float, float]] * 3
    assert resumed.state.recent_losses() == run.state.recent_losses() == [[3, 6.875], [4, 6.75], [5, 7.0], [7, 6.5]]
    again, before = trainer_state_of(resumed), trainer_state_of(run)
    for name in ("identity", "state", "environment"):
        assert again["langmlm"][name] == before["langmlm"][name]


def test_another_learning_rate_resets_the_rollbacks(start_run: Callable, checkpoint: Path):
    "The user has chosen a new one, which counts in full."
    for learning_rate, expected in ((1e-4, (0, 1.0)), (2e-3, (1, 0.5))):
        state = start_run(checkpoint, learning_rate=learning_rate).state
        assert (state.rollbacks, state.learning_rate_factor) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed: then 42, now 7"),
        ({"mlm_probability": 0.3}, "mlm_probability: then 0.15, now 0.3"),
        ({"whole_word_masking": True}, "whole_word_masking: then False, now True"),
        ({"packing": False}, "packing: then True, now False"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: then 8, now 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps x processes: then 1, now 2"),
        ({"optim": "muon"}, "optimizer: then adamw, now muon"),
        (
            {"max_steps": 5},
            "the checkpoint has done 7 steps, but this run has only 5: raise num_train_epochs or max_steps",
        ),
    ],
)
def test_settings_that_must_stay(start_run: Callable, checkpoint: Path, changes: dict, message: str):
    "The error names the setting, both values, and the way to start a new run."
    with pytest.raises(ValueError) as caught:
        start_run(checkpoint, **changes)
    assert message in str(caught.value)
    assert "max_steps" in changes or "or pass resume='weights' to start a new run" in str(caught.value)


def test_settings_that_may_change(start_run: Callable, checkpoint: Path, caplog: pytest.LogCaptureFixture):
    "They are listed in a warning; another implementation of the optimizer only rounds differently."
    caplog.set_level("WARNING", "langmlm")
    start_run(checkpoint, logging_steps=3, save_steps=2)
    assert caplog.messages == []
    start_run(checkpoint, optim="adamw_torch")
    (message,) = caplog.messages
    assert "not be bit-identical" in message and message.endswith("optim: then adamw_torch_fused, now adamw_torch")
    caplog.clear()
    longer = start_run(checkpoint, num_train_epochs=3, learning_rate=1e-3, weight_decay=0.0)
    (message,) = caplog.messages
    assert message.startswith("resuming with changed settings: ")
    total = find_starting_point(checkpoint).trainer_state["max_steps"]
    for change in (
        "learning_rate: then 0.002, now 0.001",
        "weight_decay: then 0.01, now 0.0",
        "num_train_epochs: then 2, now 3",
        f"; steps: then {total}, now {longer.loader.plan.total_steps}",
    ):
        assert change in message
    caplog.clear()
    start_run(checkpoint, max_steps=total + 1)
    (message,) = caplog.messages
    assert message.endswith(f"settings: max_steps: then -1, now {total + 1}")


def restore(run: tasks.MLMTask, trainer_state: dict, **changes) -> TrainState:
    "Restore a state in a run."
    parts = {"description": describe(run), "plan": run.loader.plan, "accelerator": run.accelerator}
    return restore_state(trainer_state, **parts | changes)


def test_another_environment(run: tasks.MLMTask, checkpoint: Path, caplog: pytest.LogCaptureFixture):
    "Results may then differ in the last bits, which a warning says; the version of Python does not matter."
    caplog.set_level("WARNING", "langmlm")
    trainer_state = deepcopy(find_starting_point(checkpoint).trainer_state)
    trainer_state["langmlm"]["environment"]["python"] = "3.9.1"
    restore(run, trainer_state)
    assert caplog.messages == []
    trainer_state["langmlm"]["environment"] |= {"torch": "2.9.0", "device": "cuda", "threads": 0}
    assert restore(run, trainer_state).step == 7
    (message,) = caplog.messages
    assert "the resumed run will not be bit-identical" in message
    assert f"torch: then 2.9.0, now {torch.__version__}" in message and "device: then cuda, now cpu" in message
    assert "threads: then 0, now " in message and "python" not in message


@pytest.mark.parametrize("version", [None, 1, 2])
def test_other_batches(run: tasks.MLMTask, checkpoint: Path, caplog, version: int | None):
    "A checkpoint of another version of the batch plan, or of the first, which stored none, is resumed with a warning."
    caplog.set_level("WARNING", "langmlm")
    trainer_state = deepcopy(find_starting_point(checkpoint).trainer_state)
    assert trainer_state["langmlm"]["environment"].pop("batch plan") == run.loader.plan.version == 3
    if version is not None:
        trainer_state["langmlm"]["environment"]["batch plan"] = version
    assert restore(run, trainer_state).step == 7
    (message,) = caplog.messages
    assert "that made other batches" in message and "some sequences of the present epoch are seen twice" in message


def test_what_decides_rounding(start_run: Callable, run: tasks.MLMTask, checkpoint: Path, monkeypatch, caplog):
    "Compiling, also when it is the automatic choice, and the precision of matrix products; on a GPU, CUDA's version."
    caplog.set_level("WARNING", "langmlm")
    environment = describe(run)["environment"]
    assert (environment["compiled"], environment["cuda"], environment["matmul precision"]) == (False, None, "highest")
    trainer_state = find_starting_point(checkpoint).trainer_state
    asked = []
    monkeypatch.setattr("langmlm.train.state.should_compile", lambda *given: asked.append(given) or True)
    torch.set_float32_matmul_precision("high")
    try:
        restore(run, trainer_state)
    finally:
        torch.set_float32_matmul_precision("highest")
    (message,) = caplog.messages
    assert "compiled: then False, now True" in message and "matmul precision: then highest, now high" in message
    assert asked == [(None, run.accelerator.device, run.loader.plan.total_steps)]
    on_gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, mixed_precision="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    parts = (*identity_parts(run), on_gpu)
    assert describe_run(*parts)["environment"]["cuda"] == "13.0"


def test_other_processes_do_not_warn(run: tasks.MLMTask, checkpoint: Path, caplog: pytest.LogCaptureFixture):
    "One process warns for all."
    caplog.set_level("WARNING", "langmlm")
    trainer_state = deepcopy(find_starting_point(checkpoint).trainer_state)
    trainer_state["langmlm"]["environment"]["torch"] = "2.9.0"
    restore(run, trainer_state, accelerator=SimpleNamespace(is_main_process=False, scaler=None))
    assert caplog.messages == []


def test_loss_scale(run: tasks.MLMTask, checkpoint: Path):
    "The loss scale of fp16 is saved and restored where there is one on both sides."
    scaler = Mock(**{"state_dict.return_value": {"scale": 1024.0}})
    with_scaler = SimpleNamespace(is_main_process=True, scaler=scaler)
    saved = trainer_state_of(run, accelerator=with_scaler)
    assert saved["langmlm"]["scaler"] == {"scale": 1024.0}
    restore(run, saved, accelerator=with_scaler)
    scaler.load_state_dict.assert_called_once_with({"scale": 1024.0})
    restore(run, saved)
    restore(run, find_starting_point(checkpoint).trainer_state, accelerator=with_scaler)
    scaler.load_state_dict.assert_called_once()


@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [(1, 3, 12), (2, 3, 6), (4, 3, 3), (6, 3, 2), (12, 3, 1), (1, 12, 12), (2, 6, 6), (1, 4, 4), (8, 1, 1)],
)
def test_global_batch_is_kept(processes: int, given: int, expected: int):
    "Twelve micro-batches of four processes; another number of accumulation steps is a choice, and compared later."
    saved = {"identity": {"gradient_accumulation_steps x processes": 12}, "config": {"gradient_accumulation_steps": 3}}
    config = TrainingConfig(gradient_accumulation_steps=given)
    kept = keep_global_batch(config, {"langmlm": saved}, processes)
    assert kept.gradient_accumulation_steps == expected and kept.given == {"gradient_accumulation_steps"}
    assert keep_global_batch(config, None, processes) is config


def test_global_batch_is_kept_again():
    "The unchanged script of a run that was resumed by one process, with 12 steps for its 3, is no change."
    saved = {"identity": {"gradient_accumulation_steps x processes": 12}, "config": {"gradient_accumulation_steps": 12}}
    saved["given_accumulation"] = 3
    for given, processes, expected in ((3, 1, 12), (3, 2, 6), (12, 4, 3), (5, 1, 5)):
        config = TrainingConfig(gradient_accumulation_steps=given)
        assert keep_global_batch(config, {"langmlm": saved}, processes).gradient_accumulation_steps == expected


def test_processes_that_cannot_share_a_batch():
    "The error names the possible numbers."
    saved = {"identity": {"gradient_accumulation_steps x processes": 12}, "config": {"gradient_accumulation_steps": 3}}
    with pytest.raises(ValueError, match=r"8 processes .* has 12: .* another number of processes \(1, 2, 3, 4, 6, 12\)"):
        keep_global_batch(TrainingConfig(gradient_accumulation_steps=3), {"langmlm": saved}, 8)


def test_restored_state_is_a_copy(run: tasks.MLMTask, checkpoint: Path):
    "Training on does not change what was read from the checkpoint."
    trainer_state = find_starting_point(checkpoint).trainer_state
    before = deepcopy(trainer_state)
    state = restore(run, trainer_state)
    state.log_history.append({"step": 7})
    state.add(torch.tensor([1.0, 1.0, 1.0]))
    assert trainer_state["log_history"] == before["log_history"]


def test_identity(run: tasks.MLMTask, checkpoint: Path):
    "What data, masks and arithmetic depend on, by names that a message can use; options of the schedule are not in it."
    identity = describe(run)["identity"]
    assert identity == run.run_folder.description["identity"] and json.loads(json.dumps(identity)) == identity
    assert {"seed", "packing", "dataset", "tokenizer", "max_length", "hidden_size", "vocab_size"} <= identity.keys()
    assert not {"learning_rate", "num_train_epochs", "max_steps", "weight_decay", "run_name"} & identity.keys()
    saved = find_starting_point(checkpoint).trainer_state
    assert saved["langmlm"]["identity"] == identity and restore(run, saved).step == 7


def test_differences(run: tasks.MLMTask):
    "All are listed, digests abbreviated; what only one of the two versions knows is not compared."

    def compare(saved: dict, current: dict) -> None:
        trainer_state = deepcopy(trainer_state_of(run))
        trainer_state["langmlm"]["identity"] = saved
        assert restore(run, trainer_state, description={**describe(run), "identity": current}).step == 7

    compare({"dataset": "5f3a", "token_budget": 512}, {"dataset": "5f3a", "token_budget": 512})
    compare({"seed": 42, "old": 1}, {"seed": 42, "new": 2})
    for digits in (8, 16):
        with pytest.raises(ValueError) as caught:
            compare(
                {"dataset": "5f3a" * digits, "token_budget": 512, "seed": 42, "old": 1},
                {"dataset": "77c0" * digits, "token_budget": 1_024, "seed": 42, "new": 2},
            )
        expected = ["- dataset: then 5f3a5f3a5f3a..., now 77c077c077c0...", "- token_budget: then 512, now 1024"]
        assert str(caught.value).splitlines()[1:] == expected
    with pytest.raises(ValueError, match="- dataset: then 5f3a, now 77c0$"):
        compare({"dataset": "5f3a"}, {"dataset": "77c0"})
