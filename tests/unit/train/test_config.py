"Training options: validation, the batch plan and the token arithmetic of a run."

import math
import os
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from langmlm.config import ConfigError, make_config
from langmlm.train.config import Arithmetic, TrainingConfig, plan_batches, run_arithmetic

CONFIG = TrainingConfig(num_train_epochs=2, per_device_train_batch_size=4, bf16=False)
LENGTHS = np.random.default_rng(0).integers(8, 65, 700).astype(np.int32)
DATASET = SimpleNamespace(lengths=LENGTHS, tokens=int(LENGTHS.sum()), max_length=64)
ARITHMETIC = run_arithmetic(DATASET, plan_batches(DATASET, CONFIG), parameters=1_000_000, config=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_epochs": 1.5}, "within an epoch, set max_steps), got 1.5"),
        ({"num_train_epochs": math.inf}, "num_train_epochs must be a whole number"),
        ({"num_train_epochs": math.nan}, "num_train_epochs must be a whole number"),
        ({"num_train_epochs": "3"}, "num_train_epochs must be int or float, got '3'"),
        ({"num_train_epochs": True}, "num_train_epochs must be int or float, got True"),
        ({"num_train_epochs": 10**9}, "num_train_epochs must be a whole number from 1 to 100,000"),
        ({"packing": "yes"}, "packing must be bool, got 'yes'"),
        ({"num_train_epochs": 0}, "num_train_epochs must be a whole number from 1 to 100,000 (to end a run within an epoch, set max_steps), got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 to 1,000,000, or \"auto\", got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be 1 to 1,000,000, got 0"),
        ({"eval_steps": 0}, "eval_steps must be at least 1, got 0"),
        ({"logging_steps": 0}, "logging_steps must be at least 1, got 0"),
        ({"save_steps": 0}, "save_steps must be at least 1, got 0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be 1 to 10**9, or -1 to use num_train_epochs, got 0"),
        ({"max_steps": -2}, "max_steps must be 1 to 10**9, or -1"),
        ({"max_steps": 10**30}, "max_steps must be 1 to 10**9, or -1"),
        ({"n_gpus": -1}, "n_gpus must be 0 or more, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be 0 or more, got inf"),
        ({"seed": -1}, "seed must be at least 0 and below 2**64, got -1"),
        ({"seed": 2**64}, "seed must be at least 0 and below 2**64, got 18446744073709551616"),
        ({"logging_steps": 10**5000}, "logging_steps must be at least 1, got an integer of more than 100 digits"),
        ({"output_dir": "run\0"}, "output_dir must be a path without null characters"),
        ({"run_name": "\ud800"}, "run_name must be a path in UTF-8"),
        ({"logging_dir": "x" * 300}, "logging_dir must be a path without null characters and with at most 255 bytes"),
        ({"max_rollbacks": -1}, "max_rollbacks must be 0 or more, got -1"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, got nan"),
        ({"learning_rate": 10**400}, "learning_rate must be above 0, got an integer of more than 100 digits"),
        ({"weight_decay": 10**400}, "weight_decay must be 0 or more, got an integer"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be above 0, got 0.0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1, got 1.0"),
        ({"decay_ratio": 0.0}, "decay_ratio must be above 0 and below 1, got 0.0"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and below 1, got 1.0"),
        ({"adam_beta2": -0.1}, "adam_beta2 must be at least 0 and below 1, got -0.1"),
        ({"mlm_probability": 1.0}, "mlm_probability must be above 0 and below 1, got 1.0"),
        ({"lr_scheduler_type": "sawtooth"}, "one of linear, cosine, warmup_stable_decay, constant_with_warmup, constant, got 'sawtooth'"),
        ({"optim": "sgd"}, "optim must be one of adamw_torch_fused, adamw_torch, muon, got 'sgd'"),
        ({"save_strategy": "hourly"}, "save_strategy must be one of steps, epoch, no, got 'hourly'"),
        ({"on_loss_spike": "pray"}, "on_loss_spike must be one of rollback, warn, ignore, got 'pray'"),
        ({"run_name": ""}, "run_name must be a non-empty string, got ''"),
        ({"report_to": ["tensorbord"]}, "got 'tensorbord'"),
        ({"fp16": True, "use_cpu": True}, "fp16=True needs a GPU"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 cannot both be True"),
    ],
)
def test_invalid_value(changes: dict, message: str):
    "The error names the option, the value and the valid values."
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**changes)
    (error,) = caught.value.errors
    assert message in error


def test_errors_are_reported_together():
    "One message has all invalid values."
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(learning_rate=-1.0, warmup_ratio=5, save_strategy="hourly", max_rollbacks=-1, eval_steps=0)
    assert len(caught.value.errors) == 5


def test_valid_limits():
    "The smallest valid values, and None where it is a value."
    TrainingConfig(max_steps=1, warmup_steps=0, max_grad_norm=0, seed=0, max_rollbacks=0, n_gpus=0, adam_beta1=0)
    TrainingConfig(seed=2**64 - 1)
    TrainingConfig(eval_steps=None, save_total_limit=None, n_gpus=None, learning_rate=1, output_dir=Path("run"))


def test_run_folder():
    "Checkpoints go to `output_dir`, else to a folder with the name of the run, which is the time by default."
    assert TrainingConfig(run_name="tweets").run_folder == Path("tweets")
    assert TrainingConfig(run_name="tweets", output_dir="elsewhere").run_folder == Path("elsewhere")
    assert TrainingConfig().run_name.startswith("mlm-20")


def test_trackers():
    "Trackers are those that are named, or all that are installed; a missing package is named."
    assert CONFIG.trackers == TrainingConfig(report_to="none").trackers == []
    with patch("langmlm.train.config._installed_trackers", lambda: ["tensorboard", "wandb"]):
        assert TrainingConfig(report_to="all").trackers == ["tensorboard", "wandb"]
        assert TrainingConfig(report_to=["wandb", "none"]).trackers == ["wandb"]
        with pytest.raises(ConfigError, match="report_to='mlflow' needs a package.*pip install mlflow"):
            TrainingConfig(report_to=["mlflow"])


def test_device_type():
    "`use_cpu` and `accelerate launch --cpu` override the accelerator."
    on_cpu = replace(CONFIG, use_cpu=True)
    gpu = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("cuda")}
    with patch.multiple("torch.accelerator", **gpu):
        assert (CONFIG.device_type, on_cpu.device_type) == ("cuda", "cpu")
        with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
            assert CONFIG.device_type == "cpu"
        assert replace(CONFIG, use_cpu=False, n_gpus=0).device_type == "cpu"
    with patch("torch.accelerator.is_available", lambda: False):
        assert CONFIG.device_type == "cpu"


def test_plan_batches():
    "Options become batch sizes; the global batch does not depend on the number of processes."
    plan = plan_batches(DATASET, CONFIG)
    assert (plan.seed, plan.token_budget, plan.sequences_per_batch, plan.batches_per_step) == (42, 4 * 64, None, 2)
    halved = plan_batches(DATASET, replace(CONFIG, gradient_accumulation_steps=1), num_processes=2)
    assert halved.batches_per_step == 2 and halved.total_steps == plan.total_steps
    assert all(np.array_equal(*rows) for rows in zip(halved.batches(3)[1], plan.batches(3)[1], strict=True))
    assert plan_batches(DATASET, replace(CONFIG, packing=False)).total_steps == 2 * math.ceil(700 / 8)
    assert plan_batches(DATASET, replace(CONFIG, max_steps=7)).total_steps == 7


def test_arithmetic():
    "The size of a run, as numbers and as a line with correct plurals."
    assert ARITHMETIC.steps == plan_batches(DATASET, CONFIG).total_steps
    assert ARITHMETIC.tokens_per_step == pytest.approx(2 * DATASET.tokens / ARITHMETIC.steps)
    assert isinstance(ARITHMETIC, Arithmetic) and ARITHMETIC.config is CONFIG
    assert f"; 2 epochs = {ARITHMETIC.steps} steps of " in str(ARITHMETIC)
    assert "; 1 epoch = 1 step of " in str(replace(ARITHMETIC, epochs=1.0, steps=1))


def test_advice():
    "A run of few steps gets a batch size, or the option to raise."
    assert replace(ARITHMETIC, steps=5_000).advice() is None is replace(ARITHMETIC, steps=1_000).advice()
    assert "per_device_train_batch_size=2 gives about 1,400" in replace(ARITHMETIC, steps=700).advice()
    smallest = replace(CONFIG, per_device_train_batch_size=1)
    assert "raise num_train_epochs" in replace(ARITHMETIC, steps=999, config=smallest).advice()
    assert "raise max_steps" in replace(ARITHMETIC, config=replace(CONFIG, max_steps=7)).advice()
    packed = replace(ARITHMETIC, steps=700, packing_ratio=4)  # A smaller batch would be packed more
    assert "raise num_train_epochs" in packed.advice() and "per_device" not in packed.advice()


def test_epochs_as_a_float():
    "A whole number of epochs may be a float, as in transformers; it is the same run."
    config = TrainingConfig(num_train_epochs=3.0)
    assert config == replace(config, num_train_epochs=3) and type(config.num_train_epochs) is int


def test_names_of_training_arguments():
    "A name of the other library gets the reason why it is not an option, and no suggestion that means something else."
    names = {"dataloader_num_workers": "in a thread", "eval_strategy": "set eval_steps", "deepspeed": "not supported"}
    with pytest.raises(ConfigError) as caught:
        make_config(TrainingConfig, "training_config", dict.fromkeys([*names, "label_smoothing_factor", "tau"], 1))
    for (name, reason), error in zip(names.items(), caught.value.errors):
        assert error.startswith(f"{name!r} is not an option: ") and reason in error
    assert "nothing that corresponds to this name of transformers.TrainingArguments" in caught.value.errors[3]
    assert caught.value.errors[4] == "'tau' is not an option"


def test_every_name_of_training_arguments():
    "Each one is an option of ours or an error with a reason."
    from transformers import TrainingArguments

    ours = {entry.name for entry in fields(TrainingConfig)}
    others = TrainingArguments.__dataclass_fields__.keys() - ours
    assert len(others) > 50 and all(TrainingConfig.explain(name) for name in others)
    assert all(TrainingConfig.explain(name) is None for name in ("tau", "", 7, "epochs"))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay", "constant_with_warmup", "constant"])
def test_warmup_longer_than_the_run(schedule: str):
    "Its peak would never be reached, which is an error; a schedule without warm-up ignores the number."
    total = plan_batches(DATASET, CONFIG).total_steps
    long = replace(CONFIG, warmup_steps=total + 1, lr_scheduler_type=schedule)
    plan_batches(DATASET, replace(long, warmup_steps=total))
    if schedule == "constant":
        assert long.count_warmup_steps(total) == 0
        plan_batches(DATASET, long)
        return
    with pytest.raises(ConfigError, match=rf"warmup_steps={total + 1} is more than the steps of the run, {total}"):
        plan_batches(DATASET, long)


def test_warmup_steps():
    "Given as steps or as a share of the run, rounded up."
    assert replace(CONFIG, warmup_ratio=0.05).count_warmup_steps(101) == 6
    assert replace(CONFIG, warmup_ratio=0.05, warmup_steps=2).count_warmup_steps(101) == 2


# Short lines

TWEETS = SimpleNamespace(lengths=np.random.default_rng(0).integers(8, 57, 5_000).astype(np.int32), max_length=512)
TWEETS.tokens = int(TWEETS.lengths.sum())
LONG = SimpleNamespace(lengths=np.full(100, 300, np.int32), tokens=30_000, max_length=512)


def test_packing_is_limited_on_short_lines():
    "A step holds about four times as many sequences as configured, and the peak learning rate is 2.8 times as high."
    plan, lines = plan_batches(TWEETS, CONFIG), plan_batches(TWEETS, replace(CONFIG, packing=False))
    assert plan.packing_ratio == 4 and lines.packing_ratio == 1
    assert 3.5 < lines.total_steps / plan.total_steps < 5
    arithmetic = run_arithmetic(TWEETS, plan, 1_000_000, CONFIG)
    assert arithmetic.learning_rate == pytest.approx(2**1.5 * CONFIG.learning_rate)
    assert "packing puts 4 times as many sequences as configured into a step" in str(arithmetic)
    assert "the peak learning rate is 0.000566 instead of 0.0002" in str(arithmetic)


def test_fill_batches():
    "The token budget is per_device_train_batch_size x max_length, and the learning rate is the configured one."
    full = replace(CONFIG, fill_batches=True)
    plan = plan_batches(TWEETS, full)
    assert (plan.token_budget, plan.packing_ratio) == (4 * 512, 1)
    arithmetic = run_arithmetic(TWEETS, plan, 1_000_000, full)
    assert arithmetic.learning_rate == full.learning_rate and "packing puts" not in str(arithmetic)


def test_long_documents_are_packed_as_before():
    "More than half of `max_length` on average: nothing changes."
    plan, full = plan_batches(LONG, CONFIG), plan_batches(LONG, replace(CONFIG, fill_batches=True))
    assert vars(plan) == vars(full)


def test_longest_sequence_fits_the_limited_budget():
    "With one short line per micro-batch, the budget is the longest line, and the ratio stays at its maximum."
    plan = plan_batches(TWEETS, replace(CONFIG, per_device_train_batch_size=1))
    assert plan.token_budget == math.ceil(4 * TWEETS.tokens / 5_000) and plan.packing_ratio == 4
    lengths = np.append(TWEETS.lengths, np.int32(500))
    uneven = SimpleNamespace(lengths=lengths, tokens=int(lengths.sum()), max_length=512)
    plan = plan_batches(uneven, replace(CONFIG, per_device_train_batch_size=1))
    assert (plan.token_budget, plan.packing_ratio) == (500, 4)


def test_advice_is_printed_with_the_size():
    "Too few steps: the printed size ends with the option to change and its value."
    assert str(replace(ARITHMETIC, steps=700)).endswith(replace(ARITHMETIC, steps=700).advice())
    assert str(replace(ARITHMETIC, steps=5_000)).count("\n") == 0
