"Sources are read as often as their weights say, in the tokenizer and in the dataset, and in every way of tokenizing."

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_from_disk

from langmlm import tasks
from langmlm.arguments import collect_arguments
from langmlm.config import ConfigError, TokenizerConfig
from langmlm.text.corpus import Corpus, TextError, open_corpus
from langmlm.text.selection import choose_weights, count_reads
from langmlm.tokens import shards as module
from langmlm.text.selection import hash_documents, select_validation
from langmlm.tokens.shards import join_dataset, write_dataset
from langmlm.tokens.tokenizer import fingerprint_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def sources(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[str]]:
    "Two sources: a file, and a folder of two files."
    folder = tmp_path_factory.mktemp("sources")
    (folder / "small").mkdir()
    for name, begin, end in (("large.txt", 0, 1_000), ("small/a.txt", 1_000, 1_100), ("small/b.txt", 1_100, 1_150)):
        (folder / name).write_text("\n".join(documents[begin:end]), encoding="utf-8")
    return {folder / "large.txt": documents[:1_000], folder / "small": documents[1_000:1_150]}


@pytest.fixture
def config(tmp_path: Path) -> TokenizerConfig:
    return TokenizerConfig(max_length=4_096, validation_fraction=0.2, path_to_save_dataset=tmp_path / "dataset")


def read_documents(folder: Path, split: str, tokenizer) -> Counter:
    "Count the documents of a split."
    return Counter(tokenizer.decode(row[1:-1]) for row in load_from_disk(str(folder))[split]["input_ids"])


def test_weights_are_rounded_by_a_hash_of_the_document():
    for weight in (0, 0.25, 1, 1.75, 4):
        reads = [count_reads(f"document {number}", weight) for number in range(4_000)]
        assert set(reads) <= {int(weight), int(weight) + (weight % 1 > 0)}
        assert sum(reads) / 4_000 == pytest.approx(weight, abs=0.03)
        assert reads == [count_reads(f"document {number}", weight) for number in range(4_000)]


def test_the_choice_is_independent_of_the_validation_split():
    documents = [f"{number} " * 100 for number in range(4_000)]
    validation = select_validation(hash_documents(documents), 0.3)
    reads = [count_reads(document, 0.3) for document in documents]
    held_out = [read for read, is_held_out in zip(reads, validation) if is_held_out]
    assert sum(held_out) / len(held_out) == pytest.approx(0.3, abs=0.06)


def test_an_exponent_keeps_the_size_and_flattens_the_shares():
    sizes = [8_000, 1_000, 1, 0]
    assert choose_weights(sizes, 1)[:3] == pytest.approx([1, 1, 1])
    for alpha in (0, 0.3, 0.7, 1):
        weights = choose_weights(sizes, alpha)
        assert sum(weight * size for weight, size in zip(weights, sizes)) == pytest.approx(9_001)
        assert weights[0] * 8_000 / (weights[1] * 1_000) == pytest.approx(8**alpha)


@pytest.mark.parametrize("mixing", [[0.5, 3], (2, 0), [1.0, 1.0], 0.3])
def test_documents_are_read_as_often_as_they_should(sources: dict, tokenizer, config, mixing):
    corpus = open_corpus(list(sources), mixing=mixing)
    sizes = [sum(len(document.encode()) for document in texts) for texts in sources.values()]
    weights = choose_weights(sizes, mixing) if isinstance(mixing, float) else mixing
    assert corpus.weights == pytest.approx(weights)
    report = write_dataset(corpus, tokenizer, config)
    expected = {"train": Counter(), "validation": Counter()}
    for texts, weight in zip(sources.values(), weights):
        for text, is_held_out in zip(texts, select_validation(hash_documents(texts), 0.2)):
            expected["validation" if is_held_out else "train"][text] += 1 if is_held_out else count_reads(text, weight)
    for split, counts in expected.items():
        assert read_documents(config.path_to_save_dataset, split, tokenizer) == +counts
    named = report["statistics"]["sources"]
    assert list(named) == [str(path) for path in sources]
    assert sum(before for before, _ in named.values()) == report["statistics"]["tokens"]
    training = report["splits"]["train"]  # An epoch does not read the validation split
    assert sum(after for _, after in named.values()) == training["tokens"] - 2 * training["sequences"]
    if mixing == (2, 0):
        assert [*named.values()][1][1] == 0
    if mixing == [0.5, 3]:
        (large, fewer), (small, more) = named.values()
        assert 0.3 < fewer / large < 0.5 and 2 < more / small < 2.8  # A fifth is held out
        assert all(f"{before:,} tokens, {after:,} in an epoch" in repr(report) for before, after in named.values())


def test_names_of_sources(sources: dict):
    "A source is named as in `data_path`: a folder after itself, not after its first file."
    file, folder = sources
    assert open_corpus(folder, mixing=0.3).sources == [str(folder)]
    assert open_corpus(str(file), mixing=0.3).sources == [str(file)]
    assert open_corpus(iter(["a text"])).sources == ["data_path"]


def test_text_without_documents(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n \n")
    with pytest.raises(TextError, match="no text"):
        tasks.create_tokenizer(tmp_path / "empty.txt", {"mixing": 0.3, "path_to_save_tokenizer": tmp_path / "t"}).train()


def test_repeated_documents_are_no_duplicates(sources: dict, tokenizer, config, tmp_path: Path):
    for drop in (False, True):
        changed = replace(config, drop_duplicates=drop, path_to_save_dataset=tmp_path / f"mixed-{drop}")
        mixed = write_dataset(open_corpus(list(sources), mixing=[2, 2]), tokenizer, changed)
        unmixed = replace(changed, path_to_save_dataset=tmp_path / f"plain-{drop}")
        plain = write_dataset(open_corpus(list(sources)), tokenizer, unmixed)
        assert {**mixed["statistics"], "sources": {}} == plain["statistics"]
        assert mixed["splits"]["train"]["sequences"] == 2 * plain["splits"]["train"]["sequences"]
        assert mixed["splits"]["validation"] == plain["splits"]["validation"]


def test_interrupted_and_shared_work_gives_the_same(sources: dict, tokenizer, config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENTS_PER_BATCH", 20)
    corpus = open_corpus(list(sources), mixing=0.3)
    expected = write_dataset(corpus, tokenizer, config, 10_000)
    for part in range(3):
        shared = replace(config, shard=(part, 3), path_to_save_dataset=tmp_path / "parts")
        write_dataset(open_corpus(list(sources), mixing=0.3), tokenizer, shared, 10_000)
    folders = [tmp_path / f"parts.part-{part}-of-3" for part in range(3)]
    assert dict(join_dataset(folders, tmp_path / "joined")) == dict(expected)
    again, write_shard, stops = replace(config, path_to_save_dataset=tmp_path / "again"), module._write_shard, []

    def stop(folder: Path, last, *arguments) -> None:
        if last.begin.shard == 4 and not stops:
            stops.append(4)
            raise OSError("the disk is full")
        write_shard(folder, last, *arguments)

    monkeypatch.setattr(module, "_write_shard", stop)
    with pytest.raises(OSError, match="the disk is full"):
        write_dataset(open_corpus(list(sources), mixing=0.3), tokenizer, again, 10_000)
    assert dict(write_dataset(open_corpus(list(sources), mixing=0.3), tokenizer, again, 10_000)) == dict(expected)


def test_the_tokenizer_is_trained_on_the_mixture(sources: dict, tmp_path: Path):
    options = {"vocab_size": 600, "mixing": [0, 3], "path_to_save_tokenizer": tmp_path / "tokenizer"}
    options |= {"path_to_save_dataset": tmp_path / "dataset"}
    task = tasks.create_tokenizer(list(sources), options)
    task.train()
    mixed = [text for text in list(sources.values())[1] for _ in range(3)]
    alone = train_tokenizer(mixed, TokenizerConfig(vocab_size=600))
    assert fingerprint_tokenizer(task.tokenizer) == fingerprint_tokenizer(alone)


def test_the_fingerprint_follows_the_mixture(sources: dict):
    prints = [open_corpus(list(sources), mixing=mixing).fingerprint() for mixing in (None, 0.3, 0.5, [1, 2], [2, 1])]
    assert len(set(prints)) == 5
    corpus = open_corpus(list(sources))
    assert Corpus(corpus.parts, corpus.options).fingerprint() == prints[0]  # As before there were mixtures
    small = list(sources)[1]
    grouped, apart = open_corpus([small], mixing=0.3), open_corpus(sorted(small.iterdir()), mixing=0.3)
    assert grouped.fingerprint() != apart.fingerprint()


def test_invalid_mixtures(sources: dict, tmp_path: Path):
    for mixing in (-0.1, 1.5, [0, 0], [1, -1], [101, 1], ["1", 2], [True, 1], []):
        with pytest.raises(ConfigError, match="mixing must be None, weights of 0 to 100"):
            TokenizerConfig(mixing=mixing)
    with pytest.raises(ConfigError, match=r"a weight for each of the 2 entries of data_path, got \[1.0, 2.0, 3.0\]"):
        tasks.create_tokenizer(list(sources), {"mixing": [1, 2, 3], "path_to_save_dataset": tmp_path / "dataset"})


def test_one_source_is_left_as_it_is(sources: dict, tokenizer, config, tmp_path: Path):
    large = next(iter(sources))
    plain = write_dataset(open_corpus(large), tokenizer, config)
    mixed = replace(config, path_to_save_dataset=tmp_path / "mixed")
    assert write_dataset(open_corpus(large, mixing=0.3), tokenizer, mixed)["content"] == plain["content"]


def test_the_command_line_takes_weights_and_an_exponent():
    def command(tokenizer_config: TokenizerConfig) -> None: ...

    for given, expected in ((["1", "2.5"], [1.0, 2.5]), (["0.3"], 0.3), (["none"], None)):
        assert collect_arguments(command, {"mixing": given})["tokenizer_config"]["mixing"] == expected


@pytest.mark.parametrize("weights", [[0.5, 3], [0, 1], [1, 1]])
def test_duplicates_belong_to_the_source_with_the_larger_weight(tmp_path: Path, tokenizer, config, weights: list[float]):
    "The copy that is read most is kept, so that a text of one's own loses nothing to the web that contains it."
    texts = [f"document number {number} of the web" for number in range(40)]
    (tmp_path / "web.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "own.txt").write_text("\n".join(texts[:10]), encoding="utf-8")
    corpus = open_corpus([tmp_path / "web.txt", tmp_path / "own.txt"], mixing=weights)
    plain = replace(config, drop_duplicates=True, validation_fraction=0.0)
    report = write_dataset(corpus, tokenizer, plain)
    found = read_documents(config.path_to_save_dataset, "train", tokenizer)
    for text in texts:
        is_own = text in texts[:10] and weights[1] > weights[0]
        assert found[text] == count_reads(text, weights[is_own])
    assert report["statistics"]["dropped"] == 10
