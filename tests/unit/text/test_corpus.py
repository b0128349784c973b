"A corpus gives every document once, in order and unchanged, as often as it is read."

import gzip
import json
import logging
from collections import Counter
from contextlib import chdir
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import HfApi
from nasty_files import own_temporary_files, run, temporary_files

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.text.corpus import SpooledTexts, docstrings, open_corpus
from langmlm.text.readers import EMPTY

TEXTS = ["two\nlines", " ", None, "flood 🌊"]
KEPT = ["two\nlines", "flood 🌊"]
COUNTS = {EMPTY: 1, "rows with null text skipped": 1}


def test_nasty_files(data: dict[str, Path]):
    "A hundred files in all formats, compressions and kinds of damage; `python benchmarks/nasty_files.py 1000` runs more."
    counts, problems = run(100, seed="short", tokenizer=data["tokenizer"], datasets=5)
    assert not problems
    assert counts["read"] > 40 and counts["errors"] > 15


def test_iterator_trains_and_is_tokenized(tmp_path: Path):
    "A generator gives its texts once; the tokenizer and the dataset are made from them, and no temporary file stays."
    texts = [text for text in islice(docstrings(), 500) if len(text) < 200]
    folders = {"path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    with own_temporary_files(tmp_path / "temporary"):
        task = tasks.create_tokenizer((text for text in texts), {"vocab_size": 600, **folders})
        task.train()
        tokenizer, corpus = task.tokenizer, open_dataset(tmp_path / "dataset")
        del task
        assert not temporary_files()
    assert [tokenizer.decode(corpus[row][1:-1]) for row in range(len(corpus))] == texts


def test_spooled_texts():
    "Spooled texts can be read again, and their file is deleted with the object."
    rows = [(number, f"text {number}\0🌊" * (number % 3)) for number in range(1_000)]
    spool = SpooledTexts(iter(rows))
    first, second = iter(spool), iter(spool)
    assert [*islice(first, 500), *second, *first] == [*rows[:500], *rows, *rows[500:]]
    file = Path(spool._file.name)
    assert file.exists()
    del spool, first, second
    assert not file.exists()


def sources() -> dict:
    "The same texts from every kind of object."
    dataset = Dataset.from_dict({"id": range(4), "text": TEXTS})
    return {
        "iterator": iter(TEXTS),
        "iterable": dict.fromkeys(TEXTS).keys(),
        "dataset": dataset,
        "stream": dataset.to_iterable_dataset(),
        "generated": IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS)),
        "split": DatasetDict(train=dataset, test=dataset.select([0])),
    }


@pytest.mark.parametrize("kind", sources())
def test_objects(kind: str):
    "Every kind of object gives the same documents, counts and digest, again and again."
    corpus = open_corpus(sources()[kind])
    for _ in range(2):
        assert list(corpus) == KEPT
        assert corpus.skipped == corpus.skipped_in(0) == COUNTS
    assert corpus.size is None
    assert corpus.fingerprint() == open_corpus(iter(TEXTS)).fingerprint()
    assert corpus.fingerprint() != open_corpus(iter(["two\nlinesflood", " 🌊"])).fingerprint()


def test_invalid_objects():
    "Objects without text are errors when the corpus is opened."
    dataset = Dataset.from_dict({"id": range(4), "text": TEXTS})
    streamed = IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS))
    cases = [
        (iter([]), {}, r"data_path \(list_iterator\) has no documents"),
        (iter([b"bytes"]), {}, "document 1: 'text' must be text, got b'bytes'"),
        (dataset, {"text_column": "body"}, r"no column 'body' \(set text_column\), only \['id', 'text'\]"),
        (streamed, {"text_column": "body"}, r"no column 'body' \(set text_column\), only \['text'\]"),
        (dataset, {"text_column": "id"}, "row 1: 'id' must be text, and its type is int64"),
        (dataset.select([]), {}, "has no documents"),
        (DatasetDict(test=dataset), {}, r"no split 'train', only \['test'\]"),
    ]
    for data_path, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_corpus(data_path, **options)


def test_iterator_with_an_invalid_text():
    "An iterator that failed cannot be read again, and the second error says so."
    corpus = open_corpus(text for text in ["fine", 5])
    with pytest.raises(ValueError, match="document 2: 'text' must be text, got 5"):
        list(corpus)
    with pytest.raises(ValueError, match="raised an error before, and an iterator can be read only once"):
        list(corpus)


def test_saved_datasets(tmp_path: Path):
    "A folder that `save_to_disk` wrote is read as the dataset; its Arrow files are files."
    dataset = Dataset.from_dict({"id": range(4), "text": TEXTS})
    DatasetDict(train=dataset).save_to_disk(tmp_path / "saved")
    saved = open_corpus(tmp_path / "saved")
    assert list(saved) == list(open_corpus(tmp_path / "saved" / "train" / "*.arrow")) == KEPT
    assert saved.fingerprint() == open_corpus(dataset).fingerprint()


def test_hub_datasets():
    "`owner/name` is streamed from the Hub at its present commit, which is also its digest."
    dataset = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    with patch.object(HfApi, "dataset_info") as info, patch("langmlm.text.corpus.load_dataset") as load:
        info.return_value.sha, load.return_value = "c0ffee", dataset
        tweets = open_corpus("owner/tweets")
        assert load.call_args.kwargs == {"split": "train", "streaming": True, "revision": "c0ffee"}
        assert list(tweets) == KEPT and tweets.parts[0].digest() == "owner/tweets c0ffee"
        load.side_effect = ValueError("Bad split: train. Available splits: ['test']")
        with pytest.raises(FileNotFoundError, match=r"Available splits: \['test'\]"):
            open_corpus("owner/tweets")
        for name in ("folder/data.txt.gz", "a.txt"):  # Files, by their names
            with pytest.raises(FileNotFoundError, match="there is no such file"):
                open_corpus(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "A folder with two text files."
    (tmp_path / "first.txt").write_bytes("Storm warning for the coast.\n\nStay inside! ⛈️\n".encode())
    (tmp_path / "second.txt").write_bytes(b"Roads are closed.\r\nThe bridge holds.")
    return tmp_path


def test_files(folder: Path):
    "Parts are read in order; sizes and counts add up; a compressed table gives the same documents."
    corpus = open_corpus(folder)
    documents = ["Storm warning for the coast.", "Stay inside! ⛈️", "Roads are closed.", "The bridge holds."]
    assert list(corpus) == [*corpus.documents(0), *corpus.documents(1)] == documents
    assert (
        corpus.size == sum(part.size for part in corpus.parts) == sum(map(len, map(Path.read_bytes, folder.iterdir())))
    )
    assert sum((Counter(corpus.skipped_in(part)) for part in range(2)), Counter()) == corpus.skipped == {EMPTY: 1}
    assert list(open_corpus([folder / "second.txt", str(folder / "*.txt")])) == documents[2:] + documents[:2]
    with gzip.open(folder / "table.jsonl.gz", "wt", encoding="utf-8") as table:
        table.writelines(json.dumps({"body": text}) + "\n" for text in documents)
    compressed = open_corpus(folder / "table.jsonl.gz", text_column="body")
    assert list(compressed) == list(compressed) == documents and compressed.size is None


def test_errors_when_opening(folder: Path, caplog: pytest.LogCaptureFixture):
    "Errors at the beginning of a source appear when the corpus is opened; losses are logged once."
    (folder / "bad").mkdir()
    (folder / "bad" / "latin.txt").write_bytes("fine\n".encode() + "café\n".encode("latin-1"))
    errors = {
        "latin.txt, line 2, byte 4": ("bad",),
        "empty list": ([],),
        r"got \[5\]": ([5],),
        "got 'page'": (".", "page"),
    }
    with chdir(folder):
        for message, (data_path, *document) in errors.items():
            with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
                open_corpus(data_path, **dict(zip(["document"], document)))
        lenient = open_corpus("bad", encoding_errors="skip")
    with caplog.at_level(logging.WARNING), chdir(folder):
        assert list(lenient) == list(lenient) == ["fine"]
    assert lenient.skipped == {"documents with invalid UTF-8 skipped": 1}
    assert caplog.text.count("latin.txt: documents with invalid UTF-8 skipped: 1") == 1


def test_opening_reads_little(tmp_path: Path):
    "Only the beginning of a file is read when the corpus is opened."
    (tmp_path / "late.jsonl").write_text('{"text": "fine"}\n' * 200_000 + '{"text": 5}\n')
    corpus = open_corpus(tmp_path / "late.jsonl")
    with pytest.raises(ValueError, match="late.jsonl, line 200001: 'text' must be text, got 5"):
        list(corpus)


def test_fingerprint(folder: Path):
    "The fingerprint covers content, order and options, not names."
    before = open_corpus(folder).fingerprint()
    renamed = (folder / "first.txt").rename(folder / "renamed.txt")
    assert open_corpus([renamed, folder / "second.txt"]).fingerprint() == before
    others = [
        open_corpus([folder / "second.txt", renamed]),
        open_corpus([renamed, folder / "second.txt"], document="file"),
    ]
    renamed.write_text("something else")
    others.append(open_corpus([renamed, folder / "second.txt"]))
    assert len({before, *(corpus.fingerprint() for corpus in others)}) == 4


def test_docstrings():
    "The demo text is a few megabytes of lines; other packages add theirs, without being imported."
    paragraphs = list(docstrings())
    assert 1e6 < sum(len(paragraph.encode()) for paragraph in paragraphs) < 4e6
    assert not any("\n" in paragraph for paragraph in paragraphs)
    assert len(list(docstrings(["fastcore"]))) > len(paragraphs)
    with pytest.raises(ValueError, match="no_such_package"):
        list(docstrings(["no_such_package"]))
