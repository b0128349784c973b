"What a recipe chooses, that given options stay, and that a time budget becomes a number of steps."

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE
from hypothesis import given, settings
from hypothesis import strategies as st

from langmlm import tasks
from langmlm.config import ConfigError, ModelConfig
from langmlm.train.config import TrainingConfig, plan_batches
from langmlm.train.recipe import _mean_tokens_per_step, plan_run, recipe_options, tokens_per_step

RECIPE = {"recipe": "efficient", "bf16": False, "disable_tqdm": True}


def make_corpus(tokens: int, max_length: int = 128) -> SimpleNamespace:
    lengths = np.full(max(1, tokens // max_length), max_length)
    return SimpleNamespace(lengths=lengths, tokens=int(lengths.sum()), max_length=max_length)


@given(tokens=st.integers(10_000, 3_000_000), epochs=st.integers(1, 40), processes=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=50)
def test_steps_have_the_chosen_size(tokens: int, epochs: int, processes: int):
    "Rows and accumulation give the tokens of a step to within one row a process, and micro-batches stay small."
    corpus, config = make_corpus(tokens), TrainingConfig(num_train_epochs=epochs)
    chosen = config.fill_in(recipe_options(config, 4, 256, corpus, processes)[0])
    rows = chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps * processes
    wanted = tokens_per_step(epochs * corpus.tokens) / corpus.max_length
    assert abs(rows - wanted) <= processes * chosen.gradient_accumulation_steps or rows == processes
    assert chosen.per_device_train_batch_size * corpus.max_length <= 16_384
    plan = plan_batches(corpus, chosen, processes)
    assert _mean_tokens_per_step(corpus, chosen, processes) == pytest.approx(
        corpus.tokens * epochs / plan.total_steps, rel=0.01
    )


def test_muon_needs_large_steps():
    "Its cost does not depend on the tokens of a step."
    config = TrainingConfig(num_train_epochs=1)
    assert "optim" not in recipe_options(config, 4, 256, make_corpus(300_000))[0]
    assert recipe_options(config, 4, 256, make_corpus(3_000_000))[0]["optim"] == "muon"
    assert "optim" not in recipe_options(config, 12, 768, make_corpus(3_000_000))[0]


def test_max_steps_and_tokens_lead_to_the_same_step():
    for tokens in (1e6, 3e7, 1e9):
        assert tokens_per_step(None, tokens / tokens_per_step(tokens)) == pytest.approx(tokens_per_step(tokens))


@pytest.mark.parametrize(
    "option",
    [
        {"learning_rate": 3e-4},
        {"mlm_probability": 0.15},  # The default, given
        {"fill_batches": False},
        {"per_device_train_batch_size": 7},
        {"gradient_accumulation_steps": 3},
    ],
    ids=lambda option: next(iter(option)),
)
def test_given_options_stay(data, tmp_path: Path, option: dict):
    task = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=RECIPE | option | {"output_dir": tmp_path})
    (name, value), *_ = option.items()
    assert getattr(task.config, name) == value
    assert task.config.mlm_probability == (0.15 if name == "mlm_probability" else 0.3)
    assert task.arithmetic().learning_rate == task.config.learning_rate  # Chosen for the step: packing does not raise it


def test_model_options(data, tmp_path: Path):
    "New models start from the corpus without dropout; given options stay, and many epochs keep dropout."
    settings = RECIPE | {"output_dir": tmp_path, "num_train_epochs": 2}
    model = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings).model
    assert model.config.hidden_dropout_prob == 0 and model.lm_head.decoder.bias.std() > 0.1
    given = ARCHITECTURE | {"initialization": "random", "hidden_dropout_prob": 0.2}
    model = tasks.create_mlm(**data, model_config=given, training_config=settings).model
    assert model.config.hidden_dropout_prob == 0.2 and not model.lm_head.decoder.bias.any()
    assert not hasattr(model.config, "initialization")
    longer = settings | {"num_train_epochs": 11}
    assert tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=longer).model.config.hidden_dropout_prob


def test_resumed_run_keeps_what_was_chosen(data, tmp_path: Path):
    "Bit for bit, with the same arguments, also when the options would be chosen otherwise now."
    config = RECIPE | {"max_steps": 6, "save_steps": 3, "logging_steps": 1}
    final = []
    for name, stop in (("whole", None), ("parts", 3)):
        task = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=config | {"output_dir": tmp_path / name})
        task.train(stop_at_step=stop)
        final.append(task)
    arguments = {"model_config": ARCHITECTURE, "training_config": {"recipe": "efficient"}}
    resumed = tasks.create_mlm(**data, **arguments, checkpoint_path=tmp_path / "parts")
    chosen = [replace(task.config, output_dir=None, run_name="run", report_to="none", probe_sentences=()) for task in (resumed, final[0])]
    assert chosen[0] == chosen[1] and chosen[0].mlm_probability == 0.3
    resumed.train()
    weights = [task.model.state_dict() for task in (final[0], resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_existing_model_keeps_its_weights(data, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A recipe for further pretraining chooses the options of the run only, and the log names no others."
    first = {"max_steps": 2, "output_dir": tmp_path / "first", "bf16": False, "per_device_train_batch_size": 4}
    tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=first).train()
    second = RECIPE | {"output_dir": tmp_path / "second"}
    with caplog.at_level(logging.INFO, "langmlm.train.recipe"):
        task = tasks.create_mlm(**data, checkpoint_path=tmp_path / "first" / "final_model", training_config=second)
    assert not any(name in caplog.text for name in ("initialization", "dropout"))
    assert "learning_rate=0.0002 is the default for new models" in caplog.text
    assert task.config.mlm_probability == 0.3 and task.model.config.hidden_dropout_prob == 0.1
    assert not task.model.lm_head.decoder.bias.std() > 0.1
    assert (task.config.learning_rate, task.config.optim) == (2e-4, "adamw_torch_fused")


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": "auto"}, {"warmup_steps": 1_500}])
def test_the_planned_run_is_what_is_measured(monkeypatch: pytest.MonkeyPatch, options: dict):
    "A short trial has other batches than the run, and is compiled or not as the run is not."
    measured = []

    def affordable(trial: TrainingConfig, minutes: float) -> float:
        measured.append(trial)
        return 4e7  # Tokens

    monkeypatch.setattr("langmlm.train.recipe._affordable_tokens", affordable)
    monkeypatch.setattr("langmlm.train.recipe._fit_batch", lambda config, make_trial: config)
    config = TrainingConfig(recipe="efficient", budget_minutes=60, use_cpu=True, bf16=False, **options)
    shape = SimpleNamespace(num_hidden_layers=4, hidden_size=256)
    planned, _ = plan_run(config, ModelConfig(), shape, make_corpus(2_000_000), lambda trial: trial)
    assert len(measured) == 2 and measured[0].max_steps == 1_000 < planned.max_steps
    assert measured[1] == replace(planned, warmup_steps=0) != replace(measured[0], max_steps=planned.max_steps)
    assert planned.warmup_steps == options.get("warmup_steps", 0)


@pytest.mark.parametrize("recipe", [None, "efficient"])
def test_existing_model_with_the_default_learning_rate(data, tmp_path: Path, recipe: str | None, caplog: pytest.LogCaptureFixture):
    "A warning, unless the rate was given; a resumed run keeps what it has."
    run = {"max_steps": 2, "output_dir": tmp_path / "first", "bf16": False, "save_steps": 1, "recipe": recipe}
    tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=run).train()
    for name, options, warns in (("final_model", {}, True), ("final_model", {"learning_rate": 2e-4}, False), ("", {}, False)):
        caplog.clear()
        given = options if not name else options | {"recipe": recipe, "output_dir": tmp_path / "second"}
        tasks.create_mlm(**data, checkpoint_path=tmp_path / "first" / name, training_config=given)
        assert ("is the default for new models: a model that" in caplog.text) is warns


@pytest.mark.parametrize("recipe", [None, "efficient"])
def test_budget_becomes_steps(data, tmp_path: Path, recipe: str | None, caplog: pytest.LogCaptureFixture):
    config = {"recipe": recipe, "budget_minutes": 0.05, "output_dir": tmp_path / "run", "bf16": False}
    with caplog.at_level(logging.INFO, "langmlm.train.recipe"):
        task = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=config)
    assert task.config.max_steps >= 1 and task.config.budget_minutes is None
    assert f"max_steps={task.config.max_steps}" in caplog.text
    assert caplog.messages[0] == "measuring the speed of a few steps, to plan budget_minutes=0.05"
    assert not (tmp_path / "run").exists()  # Nothing is written before the run begins


def test_budget_with_other_lengths():
    with pytest.raises(ConfigError, match="leave out max_steps=5"):
        TrainingConfig(budget_minutes=3, max_steps=5)
    with pytest.raises(ConfigError, match="budget_minutes must be above 0 and at most 10,000,000, got 0"):
        TrainingConfig(budget_minutes=0)
    with pytest.raises(ConfigError, match="recipe must be one of efficient, got 'fast'"):
        TrainingConfig(recipe="fast")


def test_a_path_in_the_home_folder_does_not_switch_the_recipe_off(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Replacing `~` once marked all options as given, so that the recipe had none to choose."
    monkeypatch.setenv("HOME", str(tmp_path))
    task = tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=RECIPE | {"output_dir": "~/run"})
    assert task.config.mlm_probability == 0.3 and task.config.output_dir == str(tmp_path / "run")
