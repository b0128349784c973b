"The probe finds what is in the labels and nothing else, repeats itself exactly, and reports everything invalid first."

import json
import lzma
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    MPNetConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
)

import langmlm.probe
from langmlm import evaluate, tasks
from langmlm.config import ConfigError
from langmlm.probe import (
    _bag_of_words,
    _difference,
    _drop_duplicates,
    _FineTuning,
    _load_encoder,
    _make_batches,
    _make_splits,
    _max_length,
    _Run,
    _sample,
    _score,
    _Split,
)
from langmlm.tokens.tokenizer import load_tokenizer

COMMON = ["the", "value", "of", "a", "and"]
WORDS = {"in": ["file", "path", "read", "open"], "out": ["list", "number", "class", "string"]}
FORMAT = {"format": "pt"}
FAST = {"learning_rates": [3e-3], "epochs": 3}


def make_table(number: int, seed: int = 0) -> pd.DataFrame:
    "Balanced texts whose class some of their words give away."
    draw = np.random.default_rng(seed)
    labels = ["in", "out"] * (number // 2)
    texts = [" ".join([*draw.choice(WORDS[label], 4), *draw.choice(COMMON, 4)]) + f" {seed}{row}"
             for row, label in enumerate(labels)]  # fmt: skip
    return pd.DataFrame({"text": texts, "label": labels})


@pytest.fixture(scope="module")
def model(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny encoder with its tokenizer."
    torch.manual_seed(0)
    tokenizer, folder = load_tokenizer(data["tokenizer"]), tmp_path_factory.mktemp("model") / "model"
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, type_vocab_size=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def probe(model: Path) -> Callable:
    "Evaluate the tiny encoder."
    return lambda data, **options: evaluate(model, data, **{**FAST, **options})


def accuracy(evaluation, name: str) -> float:
    "Mean accuracy of a contender."
    return float(np.mean([run["accuracy"] for run in evaluation.scores[name]]))


# What it measures


def test_separable_text_is_learned(probe: Callable):
    evaluation = probe(make_table(200), test_data=make_table(200, 1), epochs=20)
    assert accuracy(evaluation, "bag of words") > 0.98
    assert accuracy(evaluation, "the model") > 0.95 and accuracy(evaluation, "from scratch") > 0.9
    assert accuracy(evaluation, "majority class") == 0.5
    assert "The model is better than the majority class" in str(evaluation)
    assert (evaluation.examples, evaluation.train_examples, evaluation.classes) == (400, 200, 2)


def test_shuffled_labels_are_not(probe: Callable):
    "Chance is 0.5; with 300 test examples, its standard error is 0.03."
    table = make_table(600)
    table["label"] = np.random.default_rng(5).permutation(table["label"])
    evaluation = probe(table.head(300), test_data=table.tail(300), epochs=10)
    for name in ("the model", "bag of words", "from scratch"):
        assert 0.4 < accuracy(evaluation, name) < 0.6, name
    assert "The model is not better than the majority class" in evaluation.verdict


def test_the_model_is_its_weights(model: Path, monkeypatch: pytest.MonkeyPatch):
    "Pretrained and from scratch differ in nothing but the weights of the encoder, which are those of the checkpoint."
    config, weights, tokenizer = _load_encoder(model, 2)
    table, started = make_table(40), []
    labels, rows = np.arange(40) % 2, np.arange(40)
    train = _FineTuning._train
    copied = lambda network: {name: weight.clone() for name, weight in network.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(
        _FineTuning,
        "_train",
        lambda self, network, *rest: started.append(copied(network)) or train(self, network, *rest),
    )
    for given in (weights, None):
        contender = _FineTuning(config, given, tokenizer, tokenizer(list(table.text)), labels, 1, 8)
        predictions = [contender(rows, rows, 1e-3, 3) for _ in range(2)]
        assert (predictions[0] == predictions[1]).all()
    pretrained, again, scratch, _ = started
    stored = RobertaForMaskedLM.from_pretrained(model).roberta.state_dict()
    assert set(stored) == set(weights)
    assert all(torch.equal(stored[name], pretrained[f"roberta.{name}"]) for name in stored)
    assert all(torch.equal(stored[name], again[f"roberta.{name}"]) for name in stored)
    assert not any(torch.equal(stored[name], scratch[f"roberta.{name}"]) for name in stored if "query.weight" in name)
    head = [name for name in scratch if name.startswith("classifier.")]
    assert head and all(torch.equal(pretrained[name], scratch[name]) for name in head)


def test_a_diverged_model_is_never_right(probe: Callable, caplog: pytest.LogCaptureFixture):
    "Logits that are not finite are no class, so another learning rate is chosen if there is one."
    for rates in ((1e30,), (1e30, 1e-3)):
        caplog.clear()
        evaluation = probe(make_table(60), learning_rates=rates)
        assert "a model has diverged during fine-tuning: lower learning_rates" in caplog.messages
        assert (accuracy(evaluation, "the model") == 0) == (len(rates) == 1)


def test_macro_f1_counts_classes_alike():
    labels = np.array([0, 0, 0, 1])
    run = _score(lambda *_: np.zeros(4, int), (1.0,), _Split(np.arange(4), np.arange(4), (0,)), labels)[0]
    assert run.scores["accuracy"] == 0.75 and math.isclose(run.scores["macro_f1"], (6 / 7 + 0) / 2)


def test_the_setting_is_chosen_on_training_examples():
    "The test labels are random: a setting that is right about them must not win."
    labels, seen = np.arange(100) % 2, []

    def contender(train, test, setting, seed):
        seen.append((set(train), set(test), setting))
        return labels[test] if setting == 2.0 else 1 - labels[test]

    run = _score(contender, (1.0, 2.0, 3.0), _Split(np.arange(80), np.arange(80, 100), (0, 1)), labels)
    assert [part.scores["setting"] for part in run] == [2.0, 2.0]
    *tried, first, second = seen
    assert len(tried) == 3 and all(train | chosen_on == set(range(80)) for train, chosen_on, _ in tried)
    assert all(len(chosen_on) == 16 and not train & chosen_on for train, chosen_on, _ in tried)
    assert first == second == (set(range(80)), set(range(80, 100)), 2.0)


def test_a_validation_split_replaces_the_part(probe: Callable, monkeypatch: pytest.MonkeyPatch):
    splits = []
    monkeypatch.setattr(langmlm.probe, "_score_all", lambda contenders, given, labels: splits.extend(given) or {
        name: [_Run({"seed": 0}, np.arange(2), np.ones(2, bool))] for name in contenders
    })  # fmt: skip
    probe(make_table(20), test_data=make_table(8, 1), validation_data=make_table(6, 2))
    train, chosen_on = splits[0].inner(np.arange(34) % 2)
    assert (list(train), list(splits[0].test)) == (list(range(20)), list(range(20, 28)))
    assert list(chosen_on) == list(range(28, 34))


# Splits


def test_folds_are_stratified_and_disjoint():
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    splits = _make_splits([90], labels, 5, (0, 1))
    assert len(splits) == 10 and [split.seeds for split in splits] == [(0,)] * 5 + [(1,)] * 5
    for repetition in (splits[:5], splits[5:]):
        assert sorted(np.concatenate([split.test for split in repetition])) == list(range(90))
    for split in splits:
        assert np.bincount(labels[split.test]).tolist() == [10, 6, 2]
        train, chosen_on = split.inner(labels)
        assert not set(split.train) & set(split.test)
        assert sorted([*train, *chosen_on]) == sorted(split.train)
        assert np.bincount(labels[chosen_on]).tolist() == [8, 4, 1]
    assert not np.array_equal(splits[0].test, splits[5].test)


@pytest.mark.parametrize("counts", [(1, 2), (2, 2), (4, 4), (100, 3)])
def test_there_is_always_something_to_choose_on(counts: tuple[int, int]):
    labels = np.repeat([0, 1], counts)
    train, chosen_on = _Split(np.arange(len(labels)), np.arange(0), (0,)).inner(labels)
    assert len(chosen_on) and set(labels[train]) == {0, 1}


def test_samples_are_stratified():
    labels = np.repeat([0, 1, 2], [1_000, 500, 3])
    chosen = _sample(labels, 300, 3, seed=1)
    assert len(set(chosen)) == 300 and np.bincount(labels[chosen]).tolist() == pytest.approx([199, 98, 3], abs=1)
    assert len(_sample(labels, 5_000, 3, seed=1)) == len(labels)


def test_duplicates_are_in_one_split_only():
    table = pd.DataFrame({"text": ["a", "a", "b", "c", "d"], "label": ["x", "x", "y", "x", "x"]})
    test = pd.DataFrame({"text": ["c", "c"], "label": ["y", "y"]})
    validation = pd.DataFrame({"text": ["d", "c", "e"], "label": ["x", "y", "y"]})

    def drop(**others: pd.DataFrame) -> dict[str, list[str]]:
        return {name: rows.text.tolist() for name, rows in _drop_duplicates({"data": table, **others}).items()}

    assert drop() == {"data": ["a", "b", "c", "d"]}
    assert drop(test_data=test) == {"test_data": ["c", "c"], "data": ["a", "b", "d"]}
    assert drop(test_data=test, validation_data=validation) == {
        "test_data": ["c", "c"],
        "validation_data": ["d", "e"],
        "data": ["a", "b"],
    }


def test_batches_hold_each_example_once_and_little_padding():
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 100, 1_000)
    batches = _make_batches(lengths, 16, draw)
    assert sorted(np.concatenate(batches)) == list(range(1_000)) and max(map(len, batches)) == 16
    assert sum(lengths[batch].max() * len(batch) for batch in batches) < 1.15 * lengths.sum()
    assert [list(batch) for batch in batches] != [list(batch) for batch in _make_batches(lengths, 16, draw)]


def test_the_error_of_a_difference_covers_examples_and_runs():
    test = np.arange(50)
    right, wrong = np.ones(50, bool), np.zeros(50, bool)
    half = test < 25
    runs = lambda *parts: [_Run({}, test, part) for part in parts]  # noqa: E731
    error = lambda gaps: np.append(gaps, [1, -1]).var() / 50  # noqa: E731
    assert _difference(runs(right), runs(wrong)) == pytest.approx((1.0, 2 * math.sqrt(error(right))))
    assert _difference(runs(half), runs(wrong)) == pytest.approx((0.5, 2 * math.sqrt(error(half))))
    both = _difference(runs(right, wrong), runs(wrong, wrong))
    assert both == pytest.approx((0.5, 2 * math.sqrt(0.5 / 2 + error(np.full(50, 0.5)))))


def test_few_examples_prove_nothing():
    "Two equal classifiers are called different in at most 7 % of all test sets, of any size."
    generator, claimed = np.random.default_rng(0), {}
    for size in (1, 3, 10, 50):
        tested = np.arange(size)
        found = []
        for _ in range(400):
            runs = [[_Run({}, tested, generator.random(size) < 0.7)] for _ in range(2)]
            difference, error = _difference(*runs)
            found.append(abs(difference) > error)
        claimed[size] = np.mean(found)
    assert max(claimed.values()) < 0.08, claimed


def test_a_model_in_half_precision(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "It is fine-tuned in float32: half precision would lose small updates."
    shutil.copytree(model, tmp_path / "half")
    RobertaForMaskedLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    dtypes = set()
    monkeypatch.setattr(_FineTuning, "_train", lambda self, tuned, *rest: dtypes.add(tuned.dtype))
    evaluate(tmp_path / "half", make_table(40), folds=2, learning_rates=[1e-3], baselines=["from scratch"])
    assert dtypes == {torch.float32}


def test_texts_with_several_labels(model: Path):
    "One copy would be tested on, and the other one trained on."
    table = make_table(40)
    table.loc[3, "text"], table.loc[3, "label"] = table.loc[2, "text"], "another"
    with pytest.raises(ConfigError, match="rows with a text that has another label elsewhere: 2 of 40, first row 3; remove them"):
        evaluate(model, table)


# Determinism


def test_the_same_seeds_give_the_same_scores(probe: Callable):
    def scores(**options) -> list:
        torch.rand(3)
        found = probe(make_table(60), folds=3, **options).scores
        return [
            {key: run[key] for key in ("accuracy", "macro_f1", "setting")} for runs in found.values() for run in runs
        ]

    state = torch.random.get_rng_state()
    first = scores(learning_rates=(1e-3, 3e-3))
    assert first == scores(learning_rates=(1e-3, 3e-3))
    torch.random.set_rng_state(state)
    scores()
    torch_after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    torch.rand(3)
    assert torch.equal(torch_after, torch.random.get_rng_state())  # Nothing else drew from the user's generator


# What it reads


def test_files_frames_and_datasets_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: Callable):
    table, found = make_table(20).rename(columns={"text": "body", "label": "topic"}), []
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table.to_dict("records"))))
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress((tmp_path / "a.csv").read_bytes()))
    monkeypatch.setattr(langmlm.probe, "_limit_examples", lambda table, *_: found.append(table) or 1 / 0)
    files = [str(tmp_path / "a.csv"), *map(tmp_path.joinpath, ("a.tsv", "a.parquet", "a.jsonl", "a.csv.xz"))]
    for data in (table, Dataset.from_pandas(table), *files):
        with pytest.raises(ZeroDivisionError):
            probe(data, text_column="body", label_column="topic")
    assert len(found) == 7 and all(part.equals(found[0]) for part in found)
    assert found[0].text.tolist() == table.body.tolist()


def test_csv_cells_stay_what_they_are(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,label\nNA,01\n1e5,1\n", encoding="utf-8")
    table = langmlm.probe._read_labeled(tmp_path / "a.csv", "data", "text", "label")
    assert table.to_dict("list") == {"text": ["NA", "1e5"], "label": ["01", "1"]}


def test_a_byte_order_mark_long_integers_and_zst(tmp_path: Path):
    rows = [{"text": f"{number}", "label": 2**80 + number} for number in range(2)]
    content = "\ufeff" + "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(content.encode(), "zstd", asbytes=True))
    table = langmlm.probe._read_labeled(tmp_path / "a.jsonl.zst", "data", "text", "label")
    assert table.to_dict("list") == {"text": ["0", "1"], "label": [str(2**80), str(2**80 + 1)]}


def test_the_folder_of_a_run(model: Path, tmp_path: Path):
    "Its final model is evaluated, or its newest checkpoint."
    (tmp_path / "checkpoint-9").mkdir()  # Empty, and never the right one
    for name in ("checkpoint-10", "final_model"):
        shutil.copytree(model, tmp_path / name)
        assert evaluate(tmp_path, make_table(24), folds=2, baselines=[], **FAST).examples == 24
        shutil.rmtree(tmp_path / name)


def test_long_texts_are_truncated_and_counted(probe: Callable, caplog: pytest.LogCaptureFixture):
    table = make_table(24)
    table.loc[3, "text"] = "file " * 200
    evaluation = probe(table, folds=2, baselines=[], epochs=1)
    assert evaluation.truncated == 1 and "1 truncated" in str(evaluation)
    assert list(evaluation.scores) == ["the model"] and evaluation.verdict == ""


def test_any_encoder(tmp_path: Path, probe: Callable):
    "A BERT, with token types, another prefix, and a pooler that its checkpoint does not have."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *WORDS["in"], *WORDS["out"]]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path / "bert")
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    evaluation = evaluate(tmp_path / "bert", make_table(60), test_data=make_table(40, 1), learning_rates=[3e-3])
    assert accuracy(evaluation, "bag of words") > 0.95 and accuracy(evaluation, "the model") > 0.9


def test_bfloat16_reads_no_longer_batches_than_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Batches are padded to few shapes, but not beyond the positions of a BERT."
    monkeypatch.setattr(langmlm.probe, "choose_precision", lambda device: "bf16")
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = load_tokenizer(model)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=30, pad_token_id=1, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    table = make_table(40)
    table["text"] = [" ".join([text] * 9) for text in table["text"]]
    evaluation = evaluate(tmp_path / "bert", table, **FAST)
    assert evaluation.truncated == 40 and 0 <= accuracy(evaluation, "the model") <= 1


@pytest.mark.parametrize(
    "kind, options",
    [
        (BertConfig, {"max_position_embeddings": 32}),
        (MPNetConfig, {"max_position_embeddings": 34}),
        (RobertaConfig, {"max_position_embeddings": 34}),
        (RobertaConfig, {"max_position_embeddings": 36, "pad_token_id": 3}),
        (XLMRobertaConfig, {"max_position_embeddings": 33, "pad_token_id": 0}),
    ],
)
def test_the_model_decides_how_long_a_text_may_be(kind: type, options: dict[str, int], model: Path):
    "The model reads a text of the greatest length, and no longer one."
    config = kind(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, **options)
    encoder, (*_, tokenizer) = AutoModelForSequenceClassification.from_config(config), _load_encoder(model, 2)
    tokenizer.model_max_length = 10**30
    assert _max_length(encoder, tokenizer) == 32
    encoder(input_ids=torch.full((1, 32), 10))
    with pytest.raises((IndexError, RuntimeError)):
        encoder(input_ids=torch.full((1, 33), 10))
    tokenizer.model_max_length = 16
    assert _max_length(encoder, tokenizer) == 16


def test_home_folder(model: Path, monkeypatch: pytest.MonkeyPatch):
    "`~` is expanded in the paths of the model and of the data."
    monkeypatch.setenv("HOME", str(model.parent))
    make_table(24).to_csv(model.parent / "labels.csv", index=False)
    assert evaluate("~/model", "~/labels.csv", folds=2, baselines=[], epochs=1, learning_rates=[1e-3]).examples == 24


def test_punctuation_is_text():
    "A bag of words without a single letter."
    labels = np.arange(20) % 2
    predict = _bag_of_words([":) !" if label else ":( ?" for label in labels], labels)
    assert (predict(np.arange(10), np.arange(10, 20), 10.0, 0) == labels[10:]).all()


# Errors before any work


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "folds must be an integer, at least 2, got 1"),
        ({"epochs": 0}, "epochs must be an integer, at least 1, or None, got 0"),
        ({"max_train_examples": "all"}, "max_train_examples must be an integer"),
        ({"epochs": True}, "epochs must be an integer, at least 1, or None, got True"),
        ({"learning_rates": []}, "learning_rates must be a list of one or more numbers above 0, got []"),
        ({"learning_rates": [0.0]}, "learning_rates must be"),
        ({"learning_rates": 1e-3}, "learning_rates must be a list of one or more numbers above 0, got 0.001"),
        ({"learning_rates": ["1e-3"]}, "learning_rates must be a list of one or more numbers above 0, got ['1e-3']"),
        ({"seeds": (1, 1)}, "seeds must be a list of one or more different integers"),
        ({"seeds": 3}, "seeds must be a list of one or more different integers, each from 0 to 4,294,967,295, got 3"),
        ({"seeds": [2**32]}, "each from 0 to 4,294,967,295, got [4294967296]"),
        ({"baselines": ["random"]}, "baselines must be a list of 'bag of words', 'from scratch', 'majority class', or"),
        ({"baselines": None}, "empty, got None"),
        ({"baselines": "majority class"}, "empty, got 'majority class'"),
        ({"text_column": ["text"]}, "text_column must be the name of a column, got ['text']"),
        ({"validation_data": make_table(8)}, "validation_data needs test_data"),
        ({"text_column": "body"}, "text_column='body' is not a column of data; its columns are text, label"),
        ({"label_column": "topic"}, "label_column='topic' is not a column of data"),
        ({"label_column": "text"}, "text_column and label_column must differ, got 'text' for both"),
        ({"max_train_examples": 5}, "max_train_examples must be at least 8 for 2 classes"),
        (
            {"test_data": pd.DataFrame({"text": ["a"], "label": ["new"]})},
            "data, without the texts of test_data, has no examples of the label 'new', and test_data does",
        ),
        ({"test_data": make_table(0)}, "test_data has no rows: add examples"),
        ({"test_data": make_table(8, 1), "validation_data": make_table(0)}, "validation_data has no rows"),
        ({"test_data": make_table(20)}, "all rows of data are also in test_data: pass other rows"),
        ({"test_data": make_table(20).tail(19)}, "data, without the texts of test_data, has a single class, 'in'"),
    ],
)
def test_invalid_options(probe: Callable, options: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(langmlm.probe, "_load_encoder", lambda *_: pytest.fail("the model is loaded first"))
    with pytest.raises(ConfigError) as error:
        probe(make_table(20), **options)
    assert message in str(error.value)


def test_a_model_is_a_name():
    with pytest.raises(ConfigError, match="model must be the folder or the Hub name of a model, got None"):
        evaluate(None, make_table(20))


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("a", "x"), ("b", "x")], "data has a single class, 'x': add examples"),
        ([("a", "x"), ("b", "y")] * 3, "cross-validation with folds=5 needs at least 5 examples of each class"),
        ([("a", "x"), ("", "y")], "data has rows with an empty text in column 'text': 1 of 2, first row 2"),
        ([("a", "x"), (None, "y")], "data has rows with no text in column 'text': 1 of 2, first row 2"),
        ([("a", None), ("b", "y")], "data has rows with no label in column 'label': 1 of 2, first row 1"),
        ([("a", " "), ("b", "y")], "no label"),
        ([], "data has no rows"),
    ],
)
def test_invalid_rows(probe: Callable, rows: list, message: str):
    with pytest.raises(ConfigError) as error:
        probe(pd.DataFrame(rows, columns=["text", "label"]))
    assert message in str(error.value)


def test_invalid_sources(probe: Callable, tmp_path: Path):
    table = make_table(20)
    for data, message in (
        (tmp_path / "no.csv", "No such file or directory"),
        (tmp_path / "no.xlsx", "must be one file that ends in .csv, .tsv, .parquet or .jsonl"),
        (table.assign(other="").set_axis(["text", "label", "text"], axis=1), "'text' is more than one column of data;"),
        (DatasetDict(train=Dataset.from_pandas(table)), "the test split goes into test_data"),
        (list(table.text), "got list"),
    ):
        with pytest.raises(ConfigError) as error:
            probe(data)
        assert message in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", b'text\tlabel\n"The Wire\tx\nb\ty\n"c\tx\nd\ty\n', ", line 2: '\t' expected after '\"'"),
        ("a.csv", b"text,label\na, b,x\nc, d,y\n", ", line 2: 3 cells, and the header has 2: put quotes around text"),
        ("a.csv", b"text,label\na,x\nb, c,y\n", ", line 3: 3 cells, and the header has 2: put quotes around text"),
        ("a.csv", "text,label\ncaf\xe9,x\n".encode("latin-1"), ", line 2, byte 4 of the line: 0xe9 is not UTF-8"),
        ("a.csv", b"", " has no rows: add examples"),
        ("a.csv", b"text,topic\na,x\n", ", line 1: there is no column 'label' (set label_column)"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"}\n', ", line 2, character 8 of the line: cannot parse JSON"),
        ("a.jsonl", b'{"text": "a", "label": null}\n', " has rows with no label in column 'label': 1 of 1"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', " has rows with an unpaired surrogate in column 'text': 1"),
        ("a.csv.xz", lzma.compress(b"text,label\na,x\n")[:40], "a.csv.xz is truncated, damaged, or not in csv.xz"),
        ("a.parquet", b"", ": Could not open Parquet input source"),
    ],
)
def test_invalid_files(probe: Callable, tmp_path: Path, name: str, content: bytes, message: str):
    "Errors begin with the parameter and the path."
    (tmp_path / name).write_bytes(content)
    for option in ("data", "test_data"):
        with pytest.raises(ConfigError) as error:
            probe(**{"data": make_table(20), option: tmp_path / name})
        (text,) = error.value.errors
        assert text.startswith(f"{option}='{tmp_path / name}'") and message in text and "encoding_errors" not in text


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        evaluate(tmp_path / "missing", make_table(20))
    assert "missing' is neither the folder nor the Hub name of an encoder with a tokenizer" in str(error.value)


def rename(folder: Path) -> None:
    "Give all weights names that the model does not know."
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # What was loaded is mapped from it
    save_file({f"renamed.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors", FORMAT)


def resize(folder: Path) -> None:
    "Let the config contradict the weights."
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def truncate(folder: Path) -> None:
    "Leave half of the weights, as an interrupted download does."
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickle_half(folder: Path) -> None:
    "Leave half of the weights in the old format."
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def forget_the_tokenizer(folder: Path) -> None:
    "Leave the model alone, for which transformers makes up a tokenizer with special tokens only."
    for file in {*folder.iterdir()} - {folder / "config.json", folder / "model.safetensors"}:
        file.unlink()


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def divide_by_no_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))


@pytest.mark.parametrize(
    "damage, message",
    [(rename, "no weights for"), (resize, "no weights for"), (truncate, "model="), (pickle_half, "model="),
     (forget_the_tokenizer, "no tokenizer files"), (break_the_tokenizer, "model="), (divide_by_no_heads, "model=")],
)  # fmt: skip
def test_a_model_without_its_weights(model: Path, tmp_path: Path, damage: Callable, message: str):
    "It is not evaluated with random weights, which transformers would do."
    shutil.copytree(model, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path / "damaged", make_table(20))


@pytest.mark.parametrize("examples, batch_size", [(8, 16), (24, 16), (40, 256), (10_000, 16)])
def test_steps_of_a_fine_tuning(examples: int, batch_size: int):
    "At least 200, in whole epochs, and at least four of these."
    given = SimpleNamespace(epochs=None, batch_size=batch_size, _lengths=np.ones(examples))
    with patch("langmlm.probe._make_batches", return_value=[]) as epochs:
        langmlm.probe._FineTuning._train(given, torch.nn.Linear(2, 2), np.arange(examples), 1e-3, None)
    steps = -(-examples // batch_size)
    assert epochs.call_count >= 4 and 200 <= epochs.call_count * steps < max(200 + steps, 4 * steps + 1)


def test_labels_that_were_floats(probe: Callable):
    "pandas turns integers into floats where one was missing: 1.0 is the label 1."
    table = make_table(20)
    table["label"] = (table.label == table.label[0]).astype(float)
    tests = table.assign(label=table.label.astype(int)).assign(text=table.text + " more")
    assert probe(table, test_data=tests).scores


def test_a_model_with_a_head_for_other_classes(model: Path, tmp_path: Path, probe: Callable):
    "Its encoder is evaluated with a new head."
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=3).save_pretrained(tmp_path / "head")
    load_tokenizer(model).save_pretrained(tmp_path / "head")
    before, after = (
        evaluate(name, make_table(40), folds=2, baselines=[], **FAST).scores for name in (model, tmp_path / "head")
    )
    keys = ("accuracy", "macro_f1")
    assert [[run[key] for key in keys] for run in before["the model"]] == [
        [run[key] for key in keys] for run in after["the model"]
    ]


def test_without_scikit_learn(probe: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(langmlm.probe, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'langmlm\[evaluate\]'"):
        probe(make_table(20))


# The import


def test_it_is_offered_everywhere():
    assert langmlm.evaluate is tasks.evaluate is langmlm.probe.evaluate
    with pytest.raises(AttributeError, match="has no attribute 'evaluat'"):
        langmlm.evaluat  # noqa: B018


def test_importing_the_package_imports_no_torch():
    program = "import sys, langmlm; langmlm.__version__; print(sorted({'torch', 'pandas', 'sklearn'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
