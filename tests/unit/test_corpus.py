"Whatever text comes in, it is read once, in order and exactly, or refused by name."

import gzip
import http.server
import io
import sys
import threading
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nasty_files import csv_file, is_blank, json_file, own_temporary_files, run, temporary_files
from transformers import AutoTokenizer, RobertaTokenizer

from langmlm import tasks
from langmlm.text.corpus import docstrings, open_corpus
from langmlm.data.dataset import open_dataset
from langmlm.text.readers import ReadOptions, drop_blank_documents, read_documents, detect_wide_encoding
from langmlm.text.readers import read_json, read_jsonl
from langmlm.text.readers import read_csv
from langmlm.tokens.tokenizer import save_tokenizer, train_tokenizer
from langmlm.tokens.tokenizer import SPECIAL_TOKENS, TokenizerConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_nasty_files(data: dict[str, Path]):
    "A hundred files of all formats, packings and faults; `python benchmarks/nasty_files.py 1000` runs more."
    counts, faults = run(100, seed="short", tokenizer=data["tokenizer"], datasets=5)
    assert not faults
    assert counts["read"] > 40 and counts["refused"] > 15


def documents_in(data: bytes, reader=read_documents, block: int = 2**16, **options) -> list[str]:
    "The documents that a reader finds in bytes, read in small blocks."
    counts = Counter()
    with patch("langmlm.text.readers.FIRST_BLOCK", block), patch("langmlm.text.readers.LATER_BLOCKS", block):
        with patch("langmlm.text.readers.FIRST_BLOCK", block), patch("langmlm.text.readers.LATER_BLOCKS", block):
            return list(drop_blank_documents(reader(io.BytesIO(data), "a.txt", ReadOptions(**options), counts), counts))


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.lists(TEXT).map("\r\n".join).map(str.encode)), block=st.integers(1, 9))
@example(data=b"a\r\n\r\rb\r", block=1)
@example(data="\ufeff\ufeffé\n".encode(), block=3)
def test_any_bytes(data: bytes, block: int):
    "Bytes are their lines, or the first that cannot be is named; nothing else happens to them."
    if detect_wide_encoding(data):
        with pytest.raises(ValueError, match="a.txt is in UTF-"):
            documents_in(data, block=2**16)
        return
    raw = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    replaced = [line.decode("utf-8", "replace") for line in raw]
    assert documents_in(data, encoding_errors="replace") == [line for line in replaced if not is_blank(line)]
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = f"line {before.count(10) + 1}, byte {len(before) - before.rfind(10)} of the line"
        with pytest.raises(ValueError, match=f"a.txt, {place}: {data[error.start]:#04x} is not UTF-8"):
            documents_in(data, block=block)
    else:
        lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        assert documents_in(data, block=block) == [line for line in lines if not is_blank(line)]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, min_size=1), seed=st.integers(0, 99), block=st.integers(1, 20))
def test_tables_give_back_what_was_written(texts: list[str], seed: int, block: int):
    "CSV and JSON hold any text, and give it back; in CSV a line end within a text comes back as one."
    kept = [text for text in texts if not is_blank(text)]
    assert documents_in(json_file(Random(seed), "text", texts, "jsonl"), read_jsonl, block) == kept
    assert documents_in(json_file(Random(seed), "text", texts, "json"), read_json, block) == kept
    table = csv_file(Random(seed), "text", texts, ",")
    assert documents_in(table, read_csv, block) == [text.replace("\r\n", "\n") for text in kept]


@pytest.fixture
def server(tmp_path: Path):
    "The address of a folder on a server on this machine."
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with patch.object(http.server.SimpleHTTPRequestHandler, "log_message"):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}"
            running.shutdown()


def test_a_server(server: str, tmp_path: Path):
    "Files on a server are like files here; what is not there, or torn, is named."
    packed = gzip.compress(b"three\n" * 9_000)
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    (tmp_path / "packed.txt.gz").write_bytes(packed)
    (tmp_path / "torn.txt.gz").write_bytes(packed[:-9])
    texts = [Random(number).randbytes(3_000).hex() for number in range(2_000)]  # Of more bytes than fsspec reads at once
    pq.write_table(pa.table({"text": texts}), tmp_path / "large.parquet")
    (tmp_path / "large.txt").write_text("\n".join(texts))
    assert list(open_corpus(f"{server}/large.parquet")) == list(open_corpus(f"{server}/large.txt")) == texts
    corpus = open_corpus([f"{server}/plain.txt", f"{server}/packed.txt.gz"])
    assert list(corpus) == list(corpus) == ["one", "two"] + ["three"] * 9_000
    before = corpus.fingerprint()
    assert before == open_corpus([f"{server}/plain.txt", f"{server}/packed.txt.gz"]).fingerprint()
    (tmp_path / "plain.txt").write_text("one\ntwo\nmore\n")
    assert before != open_corpus([f"{server}/plain.txt", f"{server}/packed.txt.gz"]).fingerprint()
    with pytest.raises(FileNotFoundError, match=f"{server}/none.txt"):
        open_corpus(f"{server}/none.txt")
    with pytest.raises(ValueError, match=f"{server}/torn.txt.gz is torn"):
        list(open_corpus(f"{server}/torn.txt.gz"))


@pytest.mark.parametrize("address, package", [("s3://bucket/a.txt", "s3fs"), ("https://example.org/a.txt", "aiohttp")])
def test_a_missing_package_is_named(address: str, package: str):
    "What a protocol needs is said before anything else, with the command that installs it."
    absent = {package: None, "fsspec.implementations.http": None}
    with patch.dict(sys.modules, absent), patch.dict("fsspec.registry._registry", clear=True):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            open_corpus(address)


def test_an_iterator_trains_and_is_tokenized(tmp_path: Path):
    "A generator gives its texts once; both the tokenizer and the dataset are made from them, and no copy stays."
    texts = [text for text in islice(docstrings(), 500) if len(text) < 200]
    folders = {"path_to_save_tokenizer": tmp_path / "tokenizer", "path_to_save_dataset": tmp_path / "dataset"}
    with own_temporary_files(tmp_path / "temporary"):
        task = tasks.create_tokenizer((text for text in texts), {"vocab_size": 600, **folders})
        task.train()
        tokenizer, corpus = task.tokenizer, open_dataset(tmp_path / "dataset")
        del task
        assert not temporary_files()
    assert [tokenizer.decode(corpus[row][1:-1]) for row in range(len(corpus))] == texts


@pytest.fixture(scope="module")
def optioned(tmp_path_factory: pytest.TempPathFactory) -> list[list]:
    "Tokenizers with all options, as trained and as both classes load them."
    folder = tmp_path_factory.mktemp("optioned")
    options = {"lowercase": True, "unicode_normalization": "NFC", "split_digits": True}
    options["special_tokens"] = [*SPECIAL_TOKENS, "@USER", "HTTPURL"]
    tokenizer = train_tokenizer(islice(docstrings(), 500), TokenizerConfig(vocab_size=600, **options))
    save_tokenizer(tokenizer, folder)
    return [tokenizer, AutoTokenizer.from_pretrained(folder), RobertaTokenizer.from_pretrained(folder)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
@example(text="@USER Said: É 2024 HTTPURL")
def test_options_survive_both_classes(optioned: list, text: str):
    "Both classes encode as the trained tokenizer does, and no token has two digits."
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for tokenizer in optioned]
    assert ids[0] == ids[1] == ids[2]
    tokens = optioned[0].convert_ids_to_tokens(ids[0])
    assert all(sum(character in "0123456789" for character in token) <= 1 for token in tokens)
    backend = optioned[0].backend_tokenizer
    if not any(token in text for token in ("@USER", "HTTPURL")):
        assert optioned[2].decode(ids[2][1:-1]) == backend.normalizer.normalize_str(text)
