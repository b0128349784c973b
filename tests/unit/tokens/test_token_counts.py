"The counts in the manifest are those of the sequences, however a dataset was made."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from langmlm.data import dataset as reading
from langmlm.data.dataset import TokenizedDataset, open_dataset, token_counts, unigram_entropy
from langmlm.text.corpus import open_corpus
from langmlm.tokens import shards
from langmlm.tokens.shards import join_dataset, write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig

CHARACTERS = 20_000


@pytest.fixture
def text(documents: list[str], tmp_path: Path) -> Path:
    "Documents, some of them twice, in several shards."
    (tmp_path / "data.txt").write_text("\n".join(documents[:2_000] + documents[:300]), encoding="utf-8")
    return tmp_path / "data.txt"


@pytest.fixture
def config(tmp_path: Path) -> TokenizerConfig:
    "Options with a validation split."
    return TokenizerConfig(max_length=32, validation_fraction=0.1, path_to_save_dataset=tmp_path / "dataset")


def check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    "Compare the stored counts of both splits with what `datasets` reads; the ids are not read for them."
    found = {}
    for split, rows in load_from_disk(folder).items():
        dataset = open_dataset(folder, split)
        with monkeypatch.context() as context:
            context.setattr(TokenizedDataset, "blocks", None)
            found[split] = token_counts(dataset)
        counted = token_counts(TokenizedDataset(rows))
        assert found[split].tolist() == counted.tolist() == np.bincount(np.concatenate(rows["input_ids"])).tolist()
        special = [0, 1, 2, 3, 4]
        assert unigram_entropy(dataset, special) == unigram_entropy(TokenizedDataset(rows), special) > 1
    return found


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_one_process(text: Path, tokenizer, config: TokenizerConfig, drop_duplicates: bool, monkeypatch):
    "Of several shards, with and without duplicates."
    report = write_dataset(open_corpus(text), tokenizer, replace(config, drop_duplicates=drop_duplicates), CHARACTERS)
    assert (report["statistics"]["dropped"] > 200) is drop_duplicates
    assert len(list((Path(config.path_to_save_dataset) / "train").glob("*.arrow"))) > 3
    assert set(check(Path(config.path_to_save_dataset), monkeypatch)) == {"train", "validation"}


def test_resumed(text: Path, tokenizer, config: TokenizerConfig, monkeypatch):
    "Shards of an interrupted call count as well."
    written, write_shard = [], shards._write_shard

    def interrupt(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(write_shard(*arguments))

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(shards, "_write_shard", interrupt)
        write_dataset(open_corpus(text), tokenizer, config, CHARACTERS)
    write_dataset(open_corpus(text), tokenizer, config, CHARACTERS)
    check(Path(config.path_to_save_dataset), monkeypatch)


def test_joined(text: Path, tokenizer, config: TokenizerConfig, tmp_path: Path, monkeypatch):
    "Parts of several machines have the counts of the whole."
    write_dataset(open_corpus(text), tokenizer, config, CHARACTERS)
    for part in range(2):
        write_dataset(open_corpus(text), tokenizer, replace(config, shard=(part, 2)), CHARACTERS)
    join_dataset([tmp_path / f"dataset.part-{part}-of-2" for part in range(2)], tmp_path / "joined")
    whole, joined = (check(folder, monkeypatch) for folder in (tmp_path / "dataset", tmp_path / "joined"))
    assert {split: counts.tolist() for split, counts in joined.items()} == {
        split: counts.tolist() for split, counts in whole.items()
    }


def test_dataset_of_an_older_version(text: Path, tokenizer, config: TokenizerConfig, monkeypatch):
    "Without stored counts, the ids are counted, once."
    write_dataset(open_corpus(text), tokenizer, config, CHARACTERS)
    folder = Path(config.path_to_save_dataset)
    expected, read_manifest = check(folder, monkeypatch)["train"], reading.read_manifest

    def without_counts(path: Path) -> dict:
        manifest = read_manifest(path)
        for facts in manifest["splits"].values():
            del facts["token_counts"]
        return manifest

    monkeypatch.setattr(reading, "read_manifest", without_counts)
    dataset = open_dataset(folder)
    assert "token_counts" not in dataset.manifest and token_counts(dataset).tolist() == expected.tolist()
    monkeypatch.setattr(TokenizedDataset, "blocks", None)
    assert token_counts(dataset).tolist() == expected.tolist()
