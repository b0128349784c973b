"An evaluation measures what stock transformers would, on the same tokens every time."

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers import with_validation_split
import torch
import torch.nn.functional as F
from transformers import RobertaForMaskedLM

from langmlm import tasks
from langmlm.data.masking import BatchSizes, fixed_sizes
from langmlm.testing import tiny_run
from langmlm.text.selection import hash_documents, select_validation
from langmlm.train.checkpoint import save_model
from langmlm.train.evaluate import check_validation, evaluate


@pytest.fixture(scope="module")
def start_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tasks.MLMTask]:
    return with_validation_split(tmp_path_factory, 120, max_steps=50, eval_steps=20)


@pytest.fixture(scope="module")
def run(start_run: Callable) -> tasks.MLMTask:
    "A run that has begun."
    run = start_run()
    run.train(stop_at_step=10)
    return run


def measure(run: tasks.MLMTask, **changes) -> dict[str, float]:
    "Evaluate, with a changed loader."
    return evaluate(run.module, replace(run.validation, **changes), run.accelerator)


def test_equals_stock_transformers(run: tasks.MLMTask, tmp_path: Path):
    "Loss and accuracy of the model as stock `transformers` loads it, one sequence at a time; measured: equal to 1e-7."
    save_model(tmp_path / "model", run.model, run.tokenizer)
    stock, losses, correct = RobertaForMaskedLM.from_pretrained(tmp_path / "model").eval(), [], []
    for batch in run.validation.load_in_order():
        bounds = batch.cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:]):
            inside = (batch.masked_positions >= begin) & (batch.masked_positions < end)
            positions = batch.masked_positions[inside] - begin
            with torch.no_grad():
                logits = stock(input_ids=batch.input_ids[None, begin:end]).logits[0, positions]
            losses += F.cross_entropy(logits, batch.labels[inside], reduction="none").tolist()
            correct += (logits.argmax(-1) == batch.labels[inside]).tolist()
    measured = measure(run)
    assert len(losses) > 50 and list(measured) == ["eval_loss", "eval_accuracy", "eval_perplexity"]
    assert measured["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert measured["eval_accuracy"] == pytest.approx(sum(correct) / len(correct), abs=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(math.exp(measured["eval_loss"]))


def test_the_same_every_time(run: tasks.MLMTask):
    "Whatever the step, the generators of random numbers, and the size of the chunks; and nothing else changes."
    first = measure(run)
    run.module.train()
    torch.manual_seed(7)
    generator, state = torch.get_rng_state(), run.state.step
    run.state.step = 50
    assert measure(run) == first
    run.state.step = state
    assert torch.equal(torch.get_rng_state(), generator)
    for rows in (1, 3, 10_000):
        with patch.dict("langmlm.model.roberta._LOGITS_ROWS", {"cpu": rows}):
            assert measure(run) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(run: tasks.MLMTask, training: bool):
    "Dropout is off during an evaluation, and on again after it if it was on before."
    run.module.train(training)
    measure(run)
    assert run.module.training is training is run.model.training


def test_padding_does_not_count(run: tasks.MLMTask):
    "Padded batches give the same numbers; measured: equal to 1e-7."
    first, plan = measure(run), run.loader.plan
    sizes = fixed_sizes(run.dataset.lengths, plan.token_budget, run.config.mlm_probability)
    for padded in (BatchSizes(), sizes):
        measured = measure(run, sizes=padded)
        assert measured["eval_loss"] == pytest.approx(first["eval_loss"], abs=1e-5)
        assert measured["eval_accuracy"] == first["eval_accuracy"]


def test_shares_of_processes(run: tasks.MLMTask):
    "The sums over the shares of two processes are those of one, also where one has no batch at all."
    for processes in (2, 100):
        sums = torch.zeros(3, dtype=torch.float64)

        class Share:
            "An Accelerator of one of many processes, which collects the sums."

            device, autocast = run.accelerator.device, run.accelerator.autocast
            unwrap_model = staticmethod(run.accelerator.unwrap_model)

            @staticmethod
            def reduce(own: torch.Tensor) -> torch.Tensor:
                sums.add_(own.double())
                return torch.tensor([1.0, 1.0, 1.0])

        for index in range(processes):
            evaluate(run.module, replace(run.validation, process_index=index, num_processes=processes), Share)
        loss, correct, predictions = sums.tolist()
        expected = measure(run)
        assert loss / predictions == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert correct / predictions == pytest.approx(expected["eval_accuracy"], rel=1e-6)


def test_known_logits(run: tasks.MLMTask):
    "A decoder that always predicts one token is right where that is the label; the perplexity stays finite."
    labels = torch.cat([batch.labels for batch in run.validation.load_in_order()])
    favorite = int(labels.mode().values)
    decoder = run.model.lm_head.decoder
    kept = decoder.bias.detach().clone()
    with torch.no_grad():
        decoder.bias[favorite] += 1e6
    measured = measure(run)
    with torch.no_grad():
        decoder.bias.copy_(kept)
    assert measured["eval_accuracy"] == pytest.approx((labels == favorite).float().mean().item())
    assert math.isfinite(measured["eval_perplexity"]) and measured["eval_perplexity"] > 1e300


def test_nothing_to_predict(run: tasks.MLMTask):
    "A split that is too short for a single mask is an error with a remedy."
    nothing = replace(run.validation.rules, mlm_probability=1e-12)
    with pytest.raises(ValueError, match="no token of the split 'validation' is masked: raise validation_fraction"):
        measure(run, rules=nothing)


def test_what_is_checked_before_the_run(start_run: Callable, run: tasks.MLMTask):
    "A split without a prediction; sequences longer than a micro-batch of the training are no obstacle."
    check_validation(run.validation)
    check_validation(replace(run.validation, process_index=99, num_processes=100))  # Which has no batch of its own
    nothing = replace(run.validation.rules, mlm_probability=1e-12)
    with pytest.raises(ValueError, match="no token of the split 'validation' is masked: raise validation_fraction"):
        check_validation(replace(run.validation, rules=nothing))
    check_validation(replace(run.validation, plan=SimpleNamespace(token_budget=5)))
    with pytest.raises(ValueError, match="no token of the split 'validation' is masked"):
        start_run(mlm_probability=1e-12)


def test_one_long_line_among_short_ones(tmp_path: Path):
    "The limited token budget of short training lines does not exclude a line that `max_length` allows."
    long = next(line for line in (f"w{number} " * 40 for number in range(99)) if _is_held_out(line))
    short = [line for line in (f"w{number} w{number}" for number in range(120)) if line[:3] != long[:3]]
    (tmp_path / "data.txt").write_text("\n".join([*short, long]), encoding="utf-8")
    paths = {"path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    options = {"vocab_size": 400, "max_length": 64, "validation_fraction": 0.2}
    tasks.create_tokenizer(tmp_path / "data.txt", paths | options).train()
    run = tiny_run(tmp_path, per_device_train_batch_size=1, eval_steps=2, max_steps=4)
    assert run.validation.dataset.lengths.max() > run.loader.plan.token_budget
    sequences = sum(len(batch.cu_seqlens) - 1 for batch in run.validation.load_in_order())
    assert sequences == len(run.validation.dataset)
    assert sum("eval_loss" in entry for entry in run.train().log_history) == 2


def _is_held_out(document: str) -> bool:
    "Whether a document belongs to the validation split of a fifth."
    return bool(select_validation(hash_documents([document]), 0.2)[0])


def test_memory_does_not_grow_with_the_split(run: tasks.MLMTask):
    "At most a few batches are alive at any time, however many there are."
    alive, most, batches = [], 0, list(run.validation.load_in_order())

    class Loader:
        "Yields new batches forty times."

        @staticmethod
        def load_in_order():
            nonlocal most
            for batch in batches * 40:
                copied = copy.deepcopy(batch)
                alive.append(weakref.ref(copied.input_ids))
                yield copied
                del copied
                most = max(most, sum(reference() is not None for reference in alive))

    evaluate(run.module, Loader, run.accelerator)
    assert len(alive) > 30 and most <= 3


def test_log(start_run: Callable):
    "Results and their time are logged at their steps; the time does not count as training."
    history = start_run(logging_steps=25).train()
    entries = [entry for entry in history.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [20, 40, 50]
    assert all(entry["eval_runtime"] >= 0 and 0 < entry["epoch"] for entry in entries)
    assert [entry["step"] for entry in history.log_history if "loss" in entry] == [25, 50]


def test_missing_validation_split(run: tasks.MLMTask):
    "With `eval_steps`, a task needs a validation split."
    with pytest.raises(ValueError, match="eval_steps=20 needs a validation split"):
        tasks.MLMTask(run.model, run.tokenizer, run.dataset, run.config)
