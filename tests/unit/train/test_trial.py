"Time and memory of a step: what is counted, what fits, the automatic micro-batch, and errors that name the settings to change."

import re
from pathlib import Path

import pytest
import torch

from langmlm import tasks
from langmlm.testing import tiny_run
from langmlm.train.config import TrainingConfig
from langmlm.train.metrics import Estimate
from langmlm.train.trial import StepMemory, _PeakMemory, check_memory, estimate_memory, explain_memory, free_memory
from langmlm.train.trial import is_out_of_memory, measure_peak


def test_tensors_are_counted_once_and_while_they_exist():
    with _PeakMemory() as memory:
        first = torch.ones(1_000)
        view = first[10:].view(-1)
        total = first * 2  # Both exist
        del first, view
        torch.ones(500)
    assert memory.peak == 8_000 and memory.now == 4_000 and len(total) == 1_000


@pytest.mark.parametrize("free, fits, most", [(10_000, True, 25), (2_999, False, 0), (5_000, True, 5)])
def test_what_fits(free: int, fits: bool, most: int):
    memory = StepMemory(parameters=2_000, per_batch=1_000, per_sequence=200, sequences=0, free=free)
    assert (memory.needed <= memory.free) == fits and memory.most_sequences() == most


def test_an_estimate_changes_nothing(tmp_path: Path):
    "Weights, gradients and random generators are as before."
    task = tiny_run(tmp_path, use_cpu=True)
    before, state = {name: value.clone() for name, value in task.model.state_dict().items()}, torch.get_rng_state()
    memory = task.memory()
    assert memory.needed <= memory.free and 16 * task.model.num_parameters() < memory.needed < 10**8
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_checkpointing_and_dropout_are_measured(tmp_path: Path):
    model = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 256}

    def measure(dropout: float, **options) -> int:
        probabilities = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
        task = tiny_run(tmp_path, model_config=model | probabilities, use_cpu=True, **options)
        return task.memory().per_sequence

    plain = measure(0.0)
    assert measure(0.1) > plain > 1.5 * measure(0.0, gradient_checkpointing=True)


@pytest.mark.parametrize("vocab_size, size", [(600, 200), (20_000, 200), (20_000, 40)])
def test_many_short_sequences_need_what_was_estimated(tmp_path: Path, vocab_size: int, size: int):
    "Also where tensors as large as the embedding, or logits, decide the peak of a few sequences."
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "vocab_size": vocab_size}
    task = tiny_run(tmp_path, 300, {"max_length": 16}, model_config=sizes, use_cpu=True, per_device_train_batch_size=size)
    memory = task.memory()
    needed = memory.needed - memory.parameters
    predictions = round(16 * task.config.mlm_probability)
    peak = measure_peak(task.module, memory.sequences, 16, predictions)
    assert memory.sequences == size and 0.95 * peak < needed < 1.5 * peak


@pytest.mark.parametrize("options", [{}, {"recipe": "efficient"}, {"gradient_accumulation_steps": 3}])
def test_automatic_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict):
    "It splits the step that is configured, or that a recipe chooses, and a resumed run keeps it."

    def create(**changes) -> tasks.MLMTask:
        data = (tmp_path / "tokenizer", tmp_path / "dataset")
        model = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        fixed = {"output_dir": str(tmp_path / "run"), "bf16": False, "use_cpu": True, "max_steps": 4, "save_steps": 2}
        return tasks.create_mlm(*data, model, fixed | options | changes)

    tiny_run(tmp_path)
    expected = create().config
    steps = expected.per_device_train_batch_size * expected.gradient_accumulation_steps
    task = create(per_device_train_batch_size="auto")
    found = task.config
    assert found.per_device_train_batch_size == steps and found.gradient_accumulation_steps == 1
    assert found.learning_rate == expected.learning_rate
    monkeypatch.setattr("langmlm.train.trial.StepMemory.most_sequences", lambda self: 5)
    small = create(per_device_train_batch_size="auto")
    assert small.config.per_device_train_batch_size <= 5
    assert 0 <= small.config.per_device_train_batch_size * small.config.gradient_accumulation_steps - steps < 5 * 20
    small.train(stop_at_step=2)
    monkeypatch.undo()
    options |= {"per_device_train_batch_size": "auto"}
    resumed = tasks.create_mlm(tmp_path / "tokenizer", tmp_path / "dataset", None, options, tmp_path / "run")
    assert resumed.config.per_device_train_batch_size == small.config.per_device_train_batch_size
    assert resumed.config.gradient_accumulation_steps == small.config.gradient_accumulation_steps


def test_short_documents_keep_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Packing limits the tokens of a micro-batch: what memory allows is compared with these, not with full sequences."
    text = [f"tweet number {number}" for number in range(2_000)] + ["one long document " * 30]
    (tmp_path / "data.txt").write_text("\n".join(text), encoding="utf-8")
    paths = {"path_to_save_tokenizer": str(tmp_path / "tokenizer"), "path_to_save_dataset": str(tmp_path / "dataset")}
    tasks.create_tokenizer(tmp_path / "data.txt", {"vocab_size": 600, "max_length": 128} | paths).train()
    model = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}

    def create(size: int | str) -> tasks.MLMTask:
        options = {"per_device_train_batch_size": size, "output_dir": str(tmp_path / "run"), "bf16": False, "use_cpu": True}
        return tasks.create_mlm(tmp_path / "tokenizer", tmp_path / "dataset", model, options)

    wanted = create(32)
    for most in (1, 2, 5, 64):
        monkeypatch.setattr("langmlm.train.trial.StepMemory.most_sequences", lambda self: most)
        found = create("auto")
        assert found.loader.plan.steps_per_epoch == pytest.approx(wanted.loader.plan.steps_per_epoch, rel=0.1)
        assert found.loader.plan.token_budget <= most * 128


def test_too_little_memory_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr("langmlm.train.trial.free_memory", lambda device: 1_000)
    task = tiny_run(tmp_path, use_cpu=True, max_steps=1)
    task.train()
    assert "a step needs about" in caplog.text
    assert "per_device_train_batch_size=4 with gradient_accumulation_steps=2" in caplog.text


def test_a_small_batch_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The measurement takes three sequences, so it could end a run whose micro-batch fits."
    measured = []
    monkeypatch.setattr("langmlm.train.trial.estimate_memory", lambda task: measured.append(task) or estimate_memory(task))
    for size, expected in ((2, 0), (3, 1)):
        check_memory(tiny_run(tmp_path, use_cpu=True, max_steps=1, per_device_train_batch_size=size))
        assert len(measured) == expected


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_names_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type):
    original = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    task = tiny_run(tmp_path, use_cpu=True)

    def fail(*args, **options):
        raise kind(original)

    monkeypatch.setattr("langmlm.train.loop.train_step", fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        task.train()
    for part in ("per_device_train_batch_size=4", "gradient_checkpointing=True", "max_length", original):
        assert part in str(raised.value)


def test_other_errors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args, **options):
        raise RuntimeError("shapes")

    task = tiny_run(tmp_path, use_cpu=True)
    monkeypatch.setattr("langmlm.train.loop.train_step", fail)
    with pytest.raises(RuntimeError, match="^shapes$"):
        task.train()
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_remedies_keep_the_step():
    config = TrainingConfig(per_device_train_batch_size=32, gradient_accumulation_steps=2, gradient_checkpointing=True)
    text = explain_memory(config, 10 / 32)
    assert "per_device_train_batch_size=10 with gradient_accumulation_steps=7" in text
    assert "per_device_train_batch_size=16 with gradient_accumulation_steps=4" in explain_memory(config)
    assert "gradient_checkpointing" not in text
    for size, accumulated, share in ((2, 4, 0.6), (4, 8, 0.9), (32, 1, 0.03)):
        text = explain_memory(TrainingConfig(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated), share)
        smaller, steps = map(int, re.search(r"size=(\d+) with gradient_accumulation_steps=(\d+)", text).groups())
        assert smaller < size and size * accumulated <= smaller * steps < size * accumulated + smaller
    assert "per_device" not in explain_memory(TrainingConfig(per_device_train_batch_size=1))
    text = explain_memory(TrainingConfig(per_device_train_batch_size=32), is_resumed=True)  # Its batches cannot change
    assert "per_device" not in text and "set gradient_checkpointing=True" in text


def test_limits_of_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "limit").write_text("1000\n")
    (tmp_path / "none").write_text("max\n")
    whole = free_memory(torch.device("cpu"))
    monkeypatch.setattr("langmlm.train.trial._LIMITS", (str(tmp_path / "none"), str(tmp_path / "missing")))
    assert free_memory(torch.device("cpu")) > whole / 2
    monkeypatch.setattr("langmlm.train.trial._LIMITS", (str(tmp_path / "limit"),))
    assert free_memory(torch.device("cpu")) == 0


def test_batch_size_is_a_number_or_auto():
    with pytest.raises(ValueError, match="1 to 1,000,000, or \"auto\", got 'large'"):
        TrainingConfig(per_device_train_batch_size="large")


def test_estimate():
    "The time of a step times the steps that are left, rounded up to minutes, or below two of them to seconds."
    estimate = Estimate(seconds_per_step=1.95, steps_left=3_981)
    assert estimate.seconds == 1.95 * 3_981
    assert str(estimate) == "about 2 h 10 min: 3,981 steps of 1.95 s"
    assert str(Estimate(2.0, 0)) == "no steps are left"
    assert str(Estimate(2.0, 1)) == "about 2 s: 1 step of 2 s"
    assert [Estimate(seconds, 1).duration for seconds in (0.0, 0.01, 120.0, 120.1)] == ["0 s", "1 s", "120 s", "3 min"]


def test_memory_is_that_of_the_text(tmp_path: Path):
    "Neither `max_length` nor the batch size may exceed what there is: the whole dataset is the largest batch."
    task = tiny_run(tmp_path, 60, {"max_length": 5_000}, use_cpu=True, per_device_train_batch_size=1_000)
    longest, memory = int(task.dataset.lengths[:].max()), task.memory()
    assert longest < 500 and memory.sequences == task.dataset.tokens / 5_000 < 5
    peak = measure_peak(task.module, -(-task.dataset.tokens // longest), longest, round(0.15 * task.dataset.tokens))
    assert 0.7 * peak < memory.needed - memory.parameters < 1.5 * peak


@pytest.mark.parametrize("steps", [0, 1.5, "3"])
def test_steps_to_measure(steps, tmp_path: Path):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps!r}: pass an integer"):
        tiny_run(tmp_path).estimate(steps)


def test_no_estimate_of_memory_with_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Each process holds only its part of the weights, which the estimate does not know."
    task = tiny_run(tmp_path)
    monkeypatch.setattr("langmlm.train.trial.is_sharded_run", lambda: True)
    with pytest.raises(ValueError, match="under FSDP: set per_device_train_batch_size to a number"):
        task.memory()
