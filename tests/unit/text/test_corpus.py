"A corpus gives every document once, in order and unchanged, as often as it is read."

import gzip
import json
import logging
import os
from collections import Counter
from contextlib import chdir
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import HfApi
from nasty_files import own_temporary_files, run, temporary_files
from tqdm import tqdm

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.text.corpus import SpooledTexts, TextError, docstrings, open_corpus
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


def test_spooled_texts(tmp_path: Path):
    "Spooled texts can be read again and at once, and their file has no name that could be left behind."
    rows = [(number, f"text {number}\0🌊" * (number % 3)) for number in range(1_000)]
    with own_temporary_files(tmp_path / "temporary"):
        spool = SpooledTexts(iter(rows))
        first, second = iter(spool), iter(spool)
        assert [*islice(first, 500), *second, *first] == [*rows[:500], *rows, *rows[500:]]
        assert not temporary_files()


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
        assert corpus.skipped == corpus.parts[0].skipped == COUNTS
    assert corpus.size is None
    assert corpus.fingerprint() == open_corpus(iter(TEXTS)).fingerprint()
    assert corpus.fingerprint() != open_corpus(iter(["two\nlinesflood", " 🌊"])).fingerprint()


def test_columns_of_tables():
    "The column of a DataFrame has the documents of the DataFrame; a missing value is counted in both."
    table = pd.DataFrame({"text": ["one", None, "two"], "note": ["three", float("nan"), "four"]})
    for data in (table, table["text"]):
        corpus = open_corpus(data)
        assert list(corpus) == ["one", "two"] and corpus.skipped == {"rows with null text skipped": 1}
    assert list(open_corpus(table["note"])) == ["three", "four"]


def test_invalid_objects():
    "Objects without text are errors when the corpus is opened."
    dataset = Dataset.from_dict({"id": range(4), "text": TEXTS})
    streamed = IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS))
    cases = [
        (iter([]), {}, r"data_path \(list_iterator\) has no documents"),
        (iter([b"bytes"]), {}, "document 1: 'text' must be text, got bytes"),
        (iter([{"text": "a row"}]), {}, r"'text' must be text, got dict: pass rows as datasets.Dataset.from_list\(rows\)"),
        (dataset.with_transform(lambda batch: batch), {}, "has a transform, which is not applied here: apply it with map"),
        (dataset, {"text_column": "body"}, r"no column 'body' \(set text_column\), only \['id', 'text'\]"),
        (streamed, {"text_column": "body"}, r"no column 'body' \(set text_column\), only \['text'\]"),
        (dataset, {"text_column": "id"}, "row 1: 'id' must be text, and its type is int64"),
        (dataset.select([]), {}, "has no documents"),
        (DatasetDict(test=dataset), {}, r"no split 'train', only \['test'\]"),
    ]
    for data_path, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_corpus(data_path, **options)


def test_a_set_has_no_order():
    "Its order changes from process to process, and with it the dataset."
    with pytest.raises(TypeError, match="data_path must be a path, .* or an iterator of texts, got {'one'}"):
        open_corpus({"one"})


def test_iterator_in_a_progress_bar():
    "It can be read once, as the iterator itself, and loses no text."
    texts = [f"document {number}" for number in range(5)]
    for bar in (tqdm(iter(texts), disable=True), tqdm(texts, disable=True)):
        corpus = open_corpus(bar)
        assert list(corpus) == list(corpus) == texts


def test_iterator_with_an_invalid_text():
    "An iterator that failed cannot be read again, and the second error says so."
    corpus = open_corpus(text for text in ["fine", 5])
    with pytest.raises(ValueError, match="document 2: 'text' must be text, got int"):
        list(corpus)
    with pytest.raises(ValueError, match="raised an error before, and an iterator can be read only once"):
        list(corpus)


def test_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    "A folder that `save_to_disk` wrote is read as the dataset; its Arrow files are files."
    dataset = Dataset.from_dict({"id": range(4), "text": TEXTS})
    DatasetDict(train=dataset).save_to_disk(tmp_path / "saved")
    saved = open_corpus(tmp_path / "saved")
    assert list(saved) == list(open_corpus(tmp_path / "saved" / "train" / "*.arrow")) == KEPT
    assert saved.fingerprint() == open_corpus(dataset).fingerprint()
    monkeypatch.chdir(tmp_path)
    assert list(open_corpus(["saved", "saved/", "./saved"])) == KEPT  # Named twice, read once
    assert "names the same file more than once" in caplog.text


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
@pytest.mark.parametrize("content", [[{"text": "Ohio"}], {"text": "Ohio"}, '{"text": "Ohio"}\n{"text": "Iowa"}', "{", ""])
def test_files_with_names_of_saved_datasets(name: str, content: str | list | dict, tmp_path: Path):
    "Are text like all others, and invalid ones are named."
    (tmp_path / "a.txt").write_text("Maine")
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if content == "":
        assert list(open_corpus(tmp_path)) == ["Maine"]
    elif content == "{":
        with pytest.raises(ValueError, match=name):
            open_corpus(tmp_path)
    else:
        assert list(open_corpus(tmp_path))[:2] == ["Maine", "Ohio"]
    Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "saved")
    assert list(open_corpus(tmp_path / "saved")) == ["saved"]


def test_hub_datasets():
    "`owner/name` is streamed from the Hub at its present commit, which is also its digest; files elsewhere are rejected."
    dataset = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    with patch.object(HfApi, "dataset_info") as info, patch("langmlm.text.corpus.load_dataset_builder") as load:
        info.return_value.sha, builder = "c0ffee", load.return_value
        builder.as_streaming_dataset.return_value = dataset
        builder.config.data_files = {"train": ["hf://datasets/owner/tweets@c0ffee/a.parquet"]}
        tweets = open_corpus("owner/tweets")
        assert load.call_args.kwargs == {"revision": "c0ffee"}
        assert builder.as_streaming_dataset.call_args.kwargs == {"split": "train"}
        assert list(tweets) == KEPT and tweets.parts[0].digest() == "owner/tweets c0ffee"
        builder.as_streaming_dataset.reset_mock()
        outside = ("/etc/passwd", "file:///etc/passwd", "http://10.0.0.1/secret", "hf://datasets/owner/other@main/a.csv")
        for file in (*outside, "zip://a.csv::https://example.org/a.zip", "hf://datasets/o/n@c0ffee/a.zip::/etc/passwd"):
            builder.config.data_files = {"train": ["hf://datasets/owner/tweets@c0ffee/a.parquet"], "test": [file]}
            with pytest.raises(FileNotFoundError, match="names a file outside its repository"):
                open_corpus("owner/tweets")
        assert not builder.as_streaming_dataset.called
        builder.config.data_files = None
        assert list(open_corpus("owner/tweets")) == KEPT
        load.side_effect = ValueError("Bad split: train. Available splits: ['test']")
        with pytest.raises(FileNotFoundError, match=r"Available splits: \['test'\]"):
            open_corpus("owner/tweets")
        info.side_effect = Exception("[Errno 111] Connection refused")  # Of the Hub's client: no OSError
        with pytest.raises(FileNotFoundError, match="data_path 'data/tweets': there is no such file .*Connection refused"):
            open_corpus("data/tweets")
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
    assert sum((part.skipped for part in corpus.parts), Counter()) == corpus.skipped == {EMPTY: 1}
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


def test_files_without_text(tmp_path: Path):
    "An error before a tokenizer is trained; one document among them is enough."
    (tmp_path / "header.csv").write_text("id,text\n")
    (tmp_path / "spaces.txt").write_text(" \n\n")
    with pytest.raises(TextError, match="data_path has no text.*header.csv, .*spaces.txt"):
        open_corpus(tmp_path)
    (tmp_path / "more.txt").write_text("\n" * 1_000 + "fine\n")
    assert list(open_corpus(tmp_path)) == ["fine"]


def test_source_that_is_read_very_often(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "An exponent may give a tiny source an enormous weight, which is logged."
    (tmp_path / "large.txt").write_text("a long line of text\n" * 50_000)
    (tmp_path / "tiny.txt").write_text("one\n")
    for mixing, is_logged in ((0.7, False), (0.3, True)):
        caplog.clear()
        weights = open_corpus([tmp_path / "large.txt", tmp_path / "tiny.txt"], mixing=mixing).weights
        assert (weights[1] > 100) == is_logged == ("tiny.txt" in caplog.text and "times in an epoch" in caplog.text)


def test_opening_reads_little(tmp_path: Path):
    "Only the beginning of a file is read when the corpus is opened."
    (tmp_path / "late.jsonl").write_text('{"text": "fine"}\n' * 200_000 + '{"text": 5}\n')
    corpus = open_corpus(tmp_path / "late.jsonl")
    with pytest.raises(ValueError, match="late.jsonl, line 200001: 'text' must be text, got int"):
        list(corpus)


def test_only_the_text_column_is_read():
    "Other columns of a stream may be costly, or fetch what they name."
    from datasets import Features, Image, Value

    features = Features({"image": Image(), "text": Value("string")})
    dataset = Dataset.from_dict({"image": ["/no/such/image.png"] * 2, "text": KEPT}, features=features)
    assert list(open_corpus(dataset.to_iterable_dataset())) == list(open_corpus(dataset)) == KEPT


def test_files_named_twice(folder: Path, caplog: pytest.LogCaptureFixture):
    "A file is read once, whatever its names, and a warning says so; equal files are two files."
    first, second = folder / "first.txt", folder / "second.txt"
    once = list(open_corpus(first))
    assert not caplog.records
    (folder / "links").mkdir()
    (folder / "links" / "hard.txt").hardlink_to(first)
    (folder / "links" / "soft.txt").symlink_to(first)
    (folder / "copy.txt").write_bytes(first.read_bytes())
    for again in (first, folder / "links" / "hard.txt", folder / "links" / "soft.txt", folder / "." / "first.txt"):
        caplog.clear()
        assert list(open_corpus([first, again])) == once
        assert "names the same file more than once" in caplog.text and str(again) in caplog.text
    caplog.clear()
    assert list(open_corpus([first, folder / "copy.txt"])) == once * 2
    assert list(open_corpus([first, second])) == once + list(open_corpus(second))
    assert not caplog.records


def test_invalid_text_has_a_class_of_its_own(folder: Path):
    "What the readers find is a `TextError`; a broken archive is not, because another copy of the same text may be whole."
    (folder / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (folder / "bad.jsonl").write_text('{"text": 5}')
    (folder / "short.txt.gz").write_bytes(gzip.compress(bytes(range(32, 127)) * 999)[:-9])
    for name in ("latin.txt", "bad.jsonl"):
        with pytest.raises(TextError):
            open_corpus(folder / name)
    with pytest.raises((ValueError, OSError)) as caught:
        list(open_corpus(folder / "short.txt.gz"))
    assert not isinstance(caught.value, TextError)


def test_stream_fingerprints():
    "Every document counts; each reading of an iterable is compared with the fingerprint; an iterator is read once."
    lines = [f"line {number}" for number in range(1_500)]
    streams = [lambda lines=lines[:end]: ({"text": line} for line in lines) for end in (1_200, 1_500)]
    fingerprints = [open_corpus(IterableDataset.from_generator(stream)).fingerprint() for stream in streams]
    assert len(set(fingerprints)) == 2 and fingerprints[1] == open_corpus(iter(lines)).fingerprint()

    class Changing:
        def __init__(self):
            self.readings = 0

        def __iter__(self):
            self.readings += 1
            return iter([*lines, f"reading {self.readings > 5}"])

    corpus = open_corpus(changing := Changing())
    first = corpus.fingerprint()
    assert len(list(corpus)) == 1_501 and first == corpus.fingerprint()
    with pytest.raises(TextError, match=r"data_path \(Changing\) has given other documents"):
        list(corpus)
    assert changing.readings == 6 and corpus.fingerprint() != first


def test_digest_so_far():
    "The hash of what was read is that of a corpus which ends there; parts that cannot change need none."
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in ("one", "two", "three")))
    corpus, documents = open_corpus(stream), []
    for document in corpus.documents(0):
        documents.append(document)
        assert corpus.parts[0].digest_so_far() == open_corpus(iter(documents)).parts[0].digest()
    assert open_corpus(iter(documents)).parts[0].digest_so_far() == ""


class Server(BaseHTTPRequestHandler):
    "Serves one text, with or without an ETag and a date."

    text, version = b"", None

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        if self.version:
            self.send_header("ETag", self.version)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.text)

    def log_message(self, *args) -> None:
        pass


def test_files_on_a_server_without_version():
    "Without an ETag and a date, a file on the web is identified by its text; with one, by that."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/data.txt"

    def fingerprint(text: bytes, version: str | None) -> tuple[str, bool]:
        Server.text, Server.version = text, version
        corpus = open_corpus(url)
        return corpus.fingerprint(), corpus.parts[0].is_stable

    try:
        assert fingerprint(b"one text", None) != fingerprint(b"two text", None)
        assert fingerprint(b"one text", '"v1"') != fingerprint(b"two text", '"v2"')
        assert not fingerprint(b"one text", None)[1] and fingerprint(b"one text", '"v1"')[1]
    finally:
        server.shutdown()


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


def test_file_that_is_rewritten_before_its_fingerprint(tmp_path: Path):
    "The text of the fingerprint counts; a change after that is an error, also one that keeps the size."
    (tmp_path / "a.txt").write_text("storm\n")
    corpus = open_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("storm\nflood\n")
    assert corpus.fingerprint() == open_corpus(tmp_path / "a.txt").fingerprint() and list(corpus) == ["storm", "flood"]
    (tmp_path / "a.txt").write_text("storm\nsurge\n")
    os.utime(tmp_path / "a.txt", ns=(0, 0))  # The clock of the file system may not have moved
    with pytest.raises(TextError, match="has changed since this call began"):
        list(corpus)


def test_docstrings():
    "The demo text is a few megabytes of lines."
    paragraphs = list(docstrings())
    assert 1e6 < sum(len(paragraph.encode()) for paragraph in paragraphs) < 4e6
    assert not any("\n" in paragraph for paragraph in paragraphs)


def test_docstrings_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "In the order of files, without tests and installed packages; a package that is named adds its own, unimported."
    for name in ("b.py", "a/c.py", "site-packages/p.py", "a/tests/t.py", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""In {name}."""', encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    own = ["In a/c.py.", "In b.py."]
    assert list(docstrings()) == own
    both = list(docstrings(["fastcore"]))
    assert both[:2] == own and len(both) > 100
    with pytest.raises(ValueError, match="no_such_package"):
        list(docstrings(["no_such_package"]))


def test_passes_that_overlap():
    "A pass that begins before another one has ended changes neither its documents nor its verification."
    texts = [f"text {number}" for number in range(9)]
    corpus = open_corpus(IterableDataset.from_generator(lambda: ({"text": text} for text in texts)))
    corpus.fingerprint()
    outer = corpus.documents(0)
    assert [next(outer), *corpus, *outer] == [texts[0], *texts, *texts[1:]]
    mixed = open_corpus(IterableDataset.from_generator(lambda: ({"text": text} for text in texts)), mixing=0.3)
    mixed.fingerprint()
    assert list(mixed.mixed()) == texts  # The weights take a pass of their own
