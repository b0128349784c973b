"Evaluations fill the masks of sentences; nothing else changes."

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import same_weights, with_validation_split
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import pipeline

from langmlm import tasks
from langmlm.config import ConfigError
from langmlm.data.dataset import TokenizedDataset, unigram_entropy
from langmlm.data.masking import IGNORE_INDEX, BatchSizes
from langmlm.train.config import TrainingConfig
from langmlm.train.evaluate import fill_masks, find_worst_tokens, mask_sentences
from langmlm.train.sharding import gather_run

PROBES = ["Return the <mask> of the file.", "<mask> a <mask>"]


@pytest.fixture(scope="module")
def start_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tasks.MLMTask]:
    return with_validation_split(tmp_path_factory, 300, max_steps=12, logging_steps=5)


@pytest.fixture(scope="module")
def run(start_run: Callable) -> tasks.MLMTask:
    "A run that has begun."
    run = start_run(eval_steps=5, probe_sentences=PROBES)
    run.train(stop_at_step=6)
    return run


# What is filled


def test_equals_stock_transformers(run: tasks.MLMTask):
    "Tokens and probabilities of the user's sentences are those of the pipeline of `transformers`."
    run.run_folder.save(*gather_run(run.model, run.optimizer), run.state)
    folder = run.run_folder.path / f"checkpoint-{run.state.step}"
    fill = pipeline("fill-mask", model=str(folder), top_k=3)
    filled = fill_masks(run.module, run.sentences, run.accelerator)
    expected = [[fill(PROBES[0])], fill(PROBES[1])]
    for entry, masks in zip(filled, expected):
        for predictions, found in zip(entry["predictions"], masks, strict=True):
            assert [token for token, _ in predictions] == [prediction["token_str"] for prediction in found]
            scores = [prediction["score"] for prediction in found]
            assert [share for _, share in predictions] == pytest.approx(scores, abs=1e-4)
    assert [entry["sentence"] for entry in filled[:2]] == PROBES and "held_out" not in filled[0] | filled[1]


def test_held_out_sentences(run: tasks.MLMTask):
    "Three sequences of the validation split, in their order; the token in the middle is masked, and can be put back."
    validation, batch = run.validation.dataset, run.sentences.batch
    texts = [run.tokenizer.decode(ids[1:-1]).strip() for ids in validation]
    bounds, found = batch.cu_seqlens.tolist(), []
    assert run.sentences.texts[:2] == PROBES and len(run.sentences.texts) == 5
    for number, text in enumerate(run.sentences.texts[2:], 2):
        inside = (batch.masked_positions >= bounds[number]) & (batch.masked_positions < bounds[number + 1])
        (label,), (position,) = batch.labels[inside].tolist(), (batch.masked_positions[inside] - bounds[number]).tolist()
        length = bounds[number + 1] - bounds[number]
        assert abs(position - length / 2) <= 1 and 8 <= length <= 40 and text.count("<mask>") == 1
        held_out = run.tokenizer.decode([label])
        original = text.replace(" <mask>" if held_out.startswith(" ") and " <mask>" in text else "<mask>", held_out)
        found.append(next(row for row, other in enumerate(texts) if other.startswith(original.strip())))
    assert found == sorted(set(found)) and found[0] > 0 and found[-1] < len(texts) - 1
    again = mask_sentences(run.tokenizer, PROBES, validation, 32)
    assert again.texts == run.sentences.texts and torch.equal(again.batch.input_ids, batch.input_ids)


def test_no_text_of_the_corpus(start_run: Callable):
    "With `probe_held_out=False`, the files of a run hold the sentences of the user and no others."
    run = start_run(eval_steps=2, max_steps=2, probe_sentences=PROBES, probe_held_out=False)
    run.train()
    assert run.sentences.texts == PROBES
    assert start_run(eval_steps=2, probe_held_out=False).sentences is None
    for file in ("log.jsonl", "trainer_state.json", "checkpoint-2/trainer_state.json"):
        text = (run.run_folder.path / file).read_text()
        assert "filled_masks" in text and "held_out\"" not in text.replace("probe_held_out\"", "")


def test_other_datasets(run: tasks.MLMTask):
    "Short sequences are taken where there are no longer ones, long ones are cut, and special tokens are never masked."
    special, ids = run.tokenizer.all_special_ids, list(range(5, 105))
    for rows, lengths in (
        ([[0, 7, 2]], [3]),
        ([[0, 7, 2], [0, *ids, 2], [0, 3, 9, 9, 9, 9, 9, 2]], [8, 40]),
        ([[5, 6, 7, 8, 9, 10, 11, 12]], [8]),
        ([[0, 2], [0, 1, 2]], None),
        ([[0, 9, 9, 9, 9, 9, 9, 2]] * 50, [8] * 3),
    ):
        dataset = TokenizedDataset(Dataset.from_dict({"input_ids": rows}))
        sentences = mask_sentences(run.tokenizer, [], dataset, 32)
        if lengths is None:
            assert sentences is None
            continue
        assert sorted(np.diff(sentences.batch.cu_seqlens).tolist())[-len(lengths) :] == lengths
        assert not set(sentences.batch.labels.tolist()) & {*special, IGNORE_INDEX}
        if max(lengths) <= 32:  # Positions of the model
            assert all("held_out" in entry for entry in fill_masks(run.module, sentences, run.accelerator))


def test_ids_without_a_token(run: tasks.MLMTask):
    "A model may have more rows than the tokenizer has tokens."
    sentences = mask_sentences(run.tokenizer, PROBES, None, 32)
    sentences.vocabulary[3:] = []
    predictions = fill_masks(run.module, sentences, run.accelerator)[0]["predictions"][0]
    assert all(token.startswith("<") and token[1:-1].isdigit() for token, _ in predictions)


# A run that fills masks


def test_nothing_else_changes(start_run: Callable):
    "Weights and losses are bit-identical with and without, in the middle of the run and after resuming it."
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    without, with_it = start_run(), start_run(eval_steps=2, probe_sentences=PROBES)
    stopped = start_run(eval_steps=2, probe_sentences=PROBES)
    losses = [[entry["loss"] for entry in run.train().log_history if "loss" in entry] for run in (without, with_it)]
    stopped.train(stop_at_step=5)
    data = _data(stopped, "tokenizer"), _data(stopped, "dataset")
    resumed = tasks.create_mlm(*data, checkpoint_path=stopped.run_folder.path)
    resumed.train()
    assert losses[0] == losses[1]
    for run in (with_it, resumed):
        assert same_weights(run, without) and run.module.training
    assert torch.equal(torch.get_rng_state(), generator)
    filled = [[entry["filled_masks"] for entry in run.state.log_history if "eval_loss" in entry] for run in (with_it, resumed)]
    assert filled[0] == filled[1] and len(filled[0]) == 6 and filled[0][0] != filled[0][-1]
    assert resumed.config.probe_sentences == PROBES


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_generators(run: tasks.MLMTask, training: bool, monkeypatch: pytest.MonkeyPatch):
    "Dropout is off while masks are filled; then mode and generators are as before, also after an error."
    encode = run.module.encode

    def encode_and_draw(**inputs) -> torch.Tensor:
        torch.rand(1)  # As the attention kernel of a GPU does
        return encode(**inputs)

    monkeypatch.setattr(run.module, "encode", encode_and_draw)
    run.module.train(training)
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    first = fill_masks(run.module, run.sentences, run.accelerator)
    assert torch.equal(torch.get_rng_state(), generator) and run.module.training is run.model.training is training
    torch.manual_seed(6)
    assert fill_masks(run.module, run.sentences, run.accelerator) == first
    outside = replace(run.sentences.batch, input_ids=run.sentences.batch.input_ids + 10**6)
    with pytest.raises(IndexError):
        fill_masks(run.module, replace(run.sentences, batch=outside), run.accelerator)
    assert run.module.training is training


def test_log(start_run: Callable, caplog: pytest.LogCaptureFixture):
    "Entries of evaluations hold the filled masks and the unigram entropy as JSON; table and messages show them."
    caplog.set_level(logging.INFO, "langmlm")
    run = start_run(eval_steps=6, probe_sentences=PROBES[:1])
    history = run.train()
    lines = (run.run_folder.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert entries == run.state.log_history
    evaluated = [entry for entry in entries if "filled_masks" in entry]
    assert [entry["step"] for entry in evaluated] == [6, 12] and all("eval_loss" in entry for entry in evaluated)
    assert [len(entry["filled_masks"]) for entry in evaluated] == [4, 4]
    entropy = unigram_entropy(run.dataset, run.tokenizer.all_special_ids)
    assert {entry["unigram_entropy"] for entry in entries} == {entropy} == {history.unigram_entropy}
    assert f"loss to beat: {entropy:.3f}" in str(history) and "filled masks at step 12" in str(history)
    assert any(f"(unigram entropy {entropy:.3f})" in message for message in caplog.messages)
    assert any(message.startswith("validation loss ") and f"\n{PROBES[0]} -> " in message for message in caplog.messages)


def _data(run: tasks.MLMTask, name: str) -> Path:
    "Return the folder of the tokenizer or the dataset of a run."
    return run.run_folder.path.parents[1] / name


def test_without_a_validation_split(start_run: Callable, tmp_path: Path):
    "With sentences, no split is needed; without either, the error names both."
    rows = load_from_disk(_data(start_run(), "dataset"))["train"]
    DatasetDict(train=rows).save_to_disk(tmp_path / "dataset")
    settings = {"max_steps": 4, "eval_steps": 2, "bf16": False, "output_dir": tmp_path / "run"}
    data = {"tokenizer": _data(start_run(), "tokenizer"), "tokenized_dataset": tmp_path / "dataset"}
    architecture = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    run = tasks.create_mlm(**data, model_config=architecture, training_config=settings | {"probe_sentences": PROBES})
    history = run.train()
    evaluated = [entry for entry in history.log_history if "filled_masks" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4] and "eval_loss" not in evaluated[0]
    assert [entry["sentence"] for entry in evaluated[0]["filled_masks"]] == PROBES
    with pytest.raises(ValueError, match="worst_tokens needs a validation split: set eval_steps"):
        run.worst_tokens()
    with pytest.raises(ValueError, match="has no split 'validation'"):
        tasks.create_mlm(**data, model_config=architecture, training_config=settings | {"output_dir": tmp_path / "other"})
    with pytest.raises(ValueError, match="eval_steps=2 needs a validation split, or probe_sentences"):
        tasks.MLMTask(run.model, run.tokenizer, run.dataset, TrainingConfig(**settings))


# Errors before the run


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["fine <mask>", "No mask."], r"probe_sentences\[1\] must contain <mask>, got 'No mask.'"),
        ([""], r"probe_sentences\[0\] must contain <mask>, got ''"),
        (["<mask>" * 31], r"probe_sentences\[0\] has 33 tokens, and the sequences of the dataset at most 32: shorten"),
        (["fine <mask>", 3], "probe_sentences must be at most 100 strings of valid Unicode, got .*3"),
        (["<mask>\ud800"], "probe_sentences must be at most 100 strings of valid Unicode"),
        (["<mask>"] * 101, "probe_sentences must be at most 100 strings"),
        ("The <mask>.", "probe_sentences must be list or tuple, got 'The <mask>.'"),
    ],
)
def test_errors(start_run: Callable, tmp_path: Path, sentences: list, message: str, monkeypatch):
    "The sentence is named before a model is built, and nothing is written."
    monkeypatch.setattr(tasks, "new_model", Mock(side_effect=AssertionError("a model is built")))
    with pytest.raises(ConfigError, match=message):
        start_run(eval_steps=5, probe_sentences=sentences, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_errors_at_once(run: tasks.MLMTask):
    with pytest.raises(ConfigError) as caught:
        mask_sentences(run.tokenizer, ["none", "fine <mask>", "<mask>" * 40], None, 32)
    assert len(caught.value.errors) == 2
    with pytest.raises(ConfigError, match="probe_sentences needs eval_steps"):
        TrainingConfig(probe_sentences=PROBES)
    TrainingConfig(probe_sentences=tuple(PROBES * 50), eval_steps=1)


# Trackers


def test_trackers(run: tasks.MLMTask):
    "Those that take text get the filled masks, indented so that Markdown keeps `<mask>`; all get the numbers."
    folder, state = run.run_folder, run.state
    trackers = [SimpleNamespace(name=name, log=Mock()) for name in ("tensorboard", "mlflow")]
    accelerator, folder.accelerator = folder.accelerator, SimpleNamespace(
        log=Mock(), trackers=trackers, is_main_process=False
    )
    kept, state.log_history = state.log_history, []
    filled = [{"sentence": "a <mask>", "predictions": [[["b", 0.5]]]}]
    state.log_history = [{"step": state.step, "eval_loss": 1.0, "filled_masks": filled}]
    try:
        folder.save_log(state)
        folder.accelerator.log.assert_called_once_with({"eval_loss": 1.0}, step=state.step)
        trackers[0].log.assert_called_once_with({"filled_masks": "    a <mask> -> 'b' 50%"}, step=state.step)
        trackers[1].log.assert_not_called()
    finally:
        folder.accelerator, state.log_history = accelerator, kept


# The worst-predicted tokens


def test_worst_tokens(run: tasks.MLMTask):
    "Counts, losses and wrong predictions are those of the logits, computed by hand."
    found = run.worst_tokens(rows=500, min_count=1)
    labels, predicted, losses = [], [], []
    run.module.eval()
    with torch.no_grad():
        for batch in run.validation.load_in_order():
            inputs = vars(batch) | {}
            labels += inputs.pop("labels").tolist()
            logits = run.model.lm_head.decoder(run.module.encode(**inputs))
            predicted += logits.argmax(-1).tolist()
            losses += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none").tolist()
    assert found["count"].sum() == len(labels) and found["loss"].is_monotonic_decreasing
    assert (found["loss"] * found["count"]).sum() / len(labels) == pytest.approx(np.mean(losses), abs=1e-3)
    for row in found.itertuples():
        (id,) = {id for id in labels if repr(run.tokenizer.decode([id])) == row.token}
        places = [place for place, label in enumerate(labels) if label == id]
        assert row.count == len(places)
        assert row.loss == pytest.approx(np.mean([losses[place] for place in places]), abs=1e-3)
        wrong = [predicted[place] for place in places if predicted[place] != id]
        assert row.accuracy == pytest.approx(1 - len(wrong) / len(places), abs=1e-3)
        shown = row[-1].split(", ")[0] if wrong else ""
        most = max(map(wrong.count, wrong), default=0)
        assert shown.startswith(f"{most} x ") if wrong else row[-1] == ""


def test_rows_and_counts(run: tasks.MLMTask):
    "Rare tokens and further rows are left out; nothing left is an error; padding does not count."
    every, few = run.worst_tokens(rows=500, min_count=1), run.worst_tokens(rows=3, min_count=4)
    expected = every[every["count"] >= 4].head(3)
    assert few.values.tolist() == expected.values.tolist() and len(few) == 3
    for arguments, message in (
        ({"min_count": 10**6}, "no token was masked min_count=1000000 times in the validation split: lower min_count"),
        ({"rows": 0}, "rows and min_count must be integers of at least 1, got 0 and 5"),
        ({"min_count": 0}, "rows and min_count must be integers of at least 1, got 20 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run.worst_tokens(**arguments)


def test_worst_tokens_in_many_processes(run: tasks.MLMTask):
    "Every process lists all tokens, whatever its share; mode and generators are restored; padding does not count."
    run.module.train()
    generator, expected = torch.get_rng_state(), run.worst_tokens()
    share = replace(run.validation, process_index=1, num_processes=3, sizes=BatchSizes())
    found = find_worst_tokens(run.module, share, run.accelerator, run.tokenizer)
    assert found["count"].tolist() == expected["count"].tolist() and found["token"].tolist() == expected["token"].tolist()
    assert torch.equal(torch.get_rng_state(), generator) and run.module.training
