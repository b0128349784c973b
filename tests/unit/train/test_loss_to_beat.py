"The unigram entropy of the dataset is known when a run begins, and in everything that the run logs."

import logging
from pathlib import Path

import pytest
from datasets import DatasetDict, load_from_disk

from langmlm import tasks
from langmlm.data.dataset import TokenizedDataset, unigram_entropy
from langmlm.testing import tiny_run

LIMITS = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def test_stored_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    "Log and diagnosis use the counts of the manifest, which are right, and read no ids for them."
    caplog.set_level(logging.INFO, "langmlm")
    run = tiny_run(tmp_path, max_steps=100, logging_steps=50, learning_rate=1e-9)
    rows = TokenizedDataset(load_from_disk(tmp_path / "dataset")["train"])
    counted = unigram_entropy(rows, run.tokenizer.all_special_ids)
    monkeypatch.setattr(TokenizedDataset, "blocks", None)
    run.state.learning_rate_factor = 0.5  # As after a rollback
    history = run.train()
    assert [entry["unigram_entropy"] for entry in history.log_history] == [counted] * 2
    (advice,) = [message for message in caplog.messages if "knows less than the token frequencies" in message]
    assert f"and the unigram entropy of the dataset {counted:.2f} nats" in advice and "learning_rate=5e-10 may be" in advice
    assert any(f"(unigram entropy {counted:.3f})" in message for message in caplog.messages)
    (axes,) = history.plot().axes
    assert axes.get_legend().get_texts()[-1].get_text() == f"unigram entropy: {counted:.2f}"


def test_dataset_of_another_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The ids of a dataset without counts are counted once, whatever the number of entries and sessions."
    run = tiny_run(tmp_path, max_steps=6, logging_steps=2)
    expected = unigram_entropy(run.dataset, run.tokenizer.all_special_ids)
    DatasetDict(train=load_from_disk(tmp_path / "dataset")["train"]).save_to_disk(tmp_path / "foreign")
    settings = {"max_steps": 6, "logging_steps": 2, "bf16": False, "output_dir": tmp_path / "other"}
    other = tasks.create_mlm(tmp_path / "tokenizer", tmp_path / "foreign", LIMITS, settings)
    passes, blocks = [], TokenizedDataset.blocks
    monkeypatch.setattr(TokenizedDataset, "blocks", lambda dataset: passes.append(dataset) or blocks(dataset))
    other.train(stop_at_step=3)
    history = other.train()
    assert [entry["unigram_entropy"] for entry in history.log_history] == [expected] * 3 and len(passes) == 1


def test_evaluations(tmp_path: Path):
    "Entries of evaluations have it, too: the entropy of the training split."
    run = tiny_run(tmp_path, 150, {"validation_fraction": 0.2}, max_steps=5, logging_steps=100, eval_steps=2)
    entries = run.train().log_history
    expected = unigram_entropy(run.dataset, run.tokenizer.all_special_ids)
    assert {entry["step"] for entry in entries if "eval_loss" in entry} == {2, 4, 5}
    assert [entry["unigram_entropy"] for entry in entries] == [expected] * len(entries)
