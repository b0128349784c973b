"Files are found in a fixed order and decompressed completely, or the error names them."

import gzip
import http.server
import logging
import sys
import threading
from contextlib import chdir
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs
from nasty_files import COMPRESS

from langmlm.text.corpus import open_corpus
from langmlm.text.files import COMPRESSIONS, FORMATS, SourceFile, detect_format, find_files

TEXT = b"Storm warning for the coast.\n" * 1_000


def test_detect_format():
    "The extension names the format, a second one the compression."
    assert detect_format("tweets.txt") == ("txt", None)
    assert detect_format("folder.csv/Tweets.2024.JSONL.GZ") == ("jsonl", "gz")
    assert detect_format("tweets.ndjson.gz") == ("jsonl", "gz") and detect_format("table.feather") == ("arrow", None)
    unknown = [detect_format(name) for name in ("notes.md", "corpus", "corpus.xz")]
    assert unknown == [(None, None), (None, None), (None, "xz")]
    combinations = {detect_format(f"a.{form}.{compression}") for form in FORMATS for compression in COMPRESSIONS}
    assert combinations == set(product(FORMATS, COMPRESSIONS))
    assert {detect_format(f"all.{extension}") for extension in ("zip", "tar", "tgz", "7z", "rar")} == {(None, None)}


def decompress(folder: Path, data: bytes, compression: str | None) -> bytes:
    "The content of a compressed file, read in small blocks."
    (folder / "file").write_bytes(data)
    with SourceFile(str(folder / "file"), "txt", compression).open() as stream:
        return b"".join(iter(lambda: stream.read(1_000), b""))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_streams(compression: str, tmp_path: Path):
    "Consecutive compressed streams are one file."
    data, empty = COMPRESS[compression](TEXT), COMPRESS[compression](b"")
    assert decompress(tmp_path, data, compression) == TEXT
    assert decompress(tmp_path, data + empty + data, compression) == TEXT + TEXT


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_blocks_and_stream_have_the_same_bytes(compression: str | None, tmp_path: Path):
    "A file is read in blocks without empty ones, or opened as a stream that can seek."
    data = TEXT * 100
    (tmp_path / "file").write_bytes(COMPRESS[compression](data) if compression else data)
    file = SourceFile(str(tmp_path / "file"), "txt", compression)
    with patch("langmlm.text.files._BLOCK", 64):
        blocks = list(file.blocks())
    assert b"".join(blocks) == data and all(blocks) and len(blocks) > 10
    with file.open() as stream:
        assert stream.seek(7) == 7 and stream.read() == data[7:]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_truncated_or_damaged_compressed_file(compression: str, tmp_path: Path):
    "A file that ends early is an error, and so is a damaged stream after a good one."
    data = COMPRESS[compression](TEXT)
    for damaged in (data[: len(data) // 2], data[:-1], data + data[:10], data + b"X" + data[1:], data + b"garbage"):
        with pytest.raises(ValueError, match=rf"file is truncated, damaged, or not in txt\.{compression} format"):
            decompress(tmp_path, damaged, compression)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_zero_padding(compression: str, tmp_path: Path):
    "Zeros after a compressed stream, and between two, are padding."
    data = COMPRESS[compression](TEXT)
    assert decompress(tmp_path, data + bytes(512) + data + bytes(2**17), compression) == TEXT + TEXT


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_zeros_alone_are_damage(compression: str, tmp_path: Path):
    "A crash may leave a file of the right size without its content."
    with pytest.raises(ValueError, match=rf"file is truncated, damaged, or not in txt\.{compression} format"):
        decompress(tmp_path, bytes(5_000), compression)


def test_missing_file_is_no_damage():
    "The error of the operating system is not replaced."
    with pytest.raises(FileNotFoundError, match="nowhere"), SourceFile("nowhere", "txt").open():
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "A folder with two files in known formats."
    (tmp_path / "first.txt").write_bytes("Storm warning for the coast.\n\nStay inside! ⛈️\n".encode())
    (tmp_path / "second.jsonl").write_bytes(b'{"text": "Roads are closed."}\n{"text": "The bridge holds."}\n')
    return tmp_path


def test_folders_and_globs(folder: Path, caplog: pytest.LogCaptureFixture):
    "Globs and folders are sorted; files with other extensions count only if they are named."
    assert find_files(folder) == find_files(folder / "*.*")
    (folder / "README").write_text("about this corpus")
    (folder / ".hidden.txt").write_text("not read")
    with chdir(folder), caplog.at_level(logging.WARNING):
        assert [file.name for file in find_files(".")] == ["first.txt", "second.jsonl"]
        assert "ignoring 2 files, hidden or with other extensions (1 hidden, 1 without extension); " in caplog.text
        assert "a glob reads other extensions as text" in caplog.text  # But no hidden files
        assert find_files("*")[0].name == "README" and ".hidden.txt" not in [file.name for file in find_files("*")]
        assert find_files("README")[0].format == "txt"


def test_folders_that_a_glob_matches(folder: Path, caplog: pytest.LogCaptureFixture):
    "Only `**` reads what is in a folder; a warning names the folders that another glob leaves out."
    (folder / "deep").mkdir()
    (folder / "deep" / "third.txt").write_text("Not read.")
    assert find_files(folder / "f*") == find_files(folder / "first.txt") and not caplog.records
    assert [file.name.rsplit("/")[-1] for file in find_files(folder / "*")] == ["first.txt", "second.jsonl"]
    assert f"ignoring folders, since only a glob with `/**` reads their files: {folder / 'deep'}" in caplog.text
    caplog.clear()
    assert len(find_files(folder / "**")) == 3 and not caplog.records


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("third.txt", FileNotFoundError, "third.txt"),
        ("*.csv", FileNotFoundError, "no file matches it as a glob"),
        ("Storm warning for the coast.", FileNotFoundError, r"iter\(\[...\]\)"),
        ("empty.*", ValueError, "names empty files: "),
        ("all.tar.gz", ValueError, "names an archive, all.tar.gz: extract it"),
        ("deep", FileNotFoundError, "the folder has no file with extension .txt, .jsonl"),
    ],
)
def test_errors_name_the_path(folder: Path, name: str, kind: type, message: str):
    "Missing files, files that are all empty, and archives are errors."
    (folder / "empty.txt").touch()
    (folder / "all.tar.gz").touch()
    (folder / "deep").mkdir()
    with pytest.raises(kind, match=message):
        find_files(folder / name)


def test_empty_files_beside_others_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture):
    "One empty file of many is no reason to stop, whether a folder or a glob names them."
    expected = find_files(folder)
    for name in ("empty.txt", "none.md"):
        (folder / name).touch()
    for part in (folder, folder / "*.*"):
        caplog.clear()
        assert find_files(part) == expected and "empty file" in caplog.text
    assert "empty.txt" in caplog.text and "none.md" in caplog.text


def test_a_folder_without_known_files_says_what_it_has(tmp_path: Path):
    for name in ("one.md", "two.md", "page.html", ".hidden", "Makefile"):
        (tmp_path / name).write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\(it has: none\); a glob reads other extensions as text"):
        find_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"\(it has: 2 .md, 1 hidden, 1 without extension, 1 .html\)"):
        find_files(tmp_path)


def test_urls():
    "A URL is a file, a glob or a folder."
    memory, _ = url_to_fs("memory://corpus")
    memory.pipe({"/corpus/first.txt.gz": gzip.compress(TEXT), "/corpus/deep/second.csv": b"text\nRoads are closed.\n"})
    remote = find_files("memory://corpus")
    assert remote == find_files("memory://corpus/deep/*.csv") + find_files("memory://corpus/first.txt.gz")
    with remote[1].open() as stream:
        assert stream.read() == TEXT
    for name, message in {"third.txt": "there is no file .*third.txt", "*.json": "no file matches this glob"}.items():
        with pytest.raises(FileNotFoundError, match=message):
            find_files(f"memory://corpus/{name}")
    with pytest.raises(ValueError, match="data_path 'nosuch://corpus/a.txt': .*nosuch"):
        find_files("nosuch://corpus/a.txt")


@pytest.fixture
def server(tmp_path: Path):
    "The address of a folder on a web server on this machine."
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with patch.object(http.server.SimpleHTTPRequestHandler, "log_message"):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}"
            running.shutdown()


def test_web_server(server: str, tmp_path: Path):
    "Files on a server are read like local files; missing and truncated ones are named."
    compressed = gzip.compress(b"three\n" * 9_000)
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    (tmp_path / "compressed.txt.gz").write_bytes(compressed)
    (tmp_path / "truncated.txt.gz").write_bytes(compressed[:-9])
    texts = [Random(number).randbytes(3_000).hex() for number in range(2_000)]  # More bytes than fsspec reads at once
    pq.write_table(pa.table({"text": texts}), tmp_path / "large.parquet")
    (tmp_path / "large.txt").write_text("\n".join(texts))
    assert list(open_corpus(f"{server}/large.parquet")) == list(open_corpus(f"{server}/large.txt")) == texts
    corpus = open_corpus([f"{server}/plain.txt", f"{server}/compressed.txt.gz"])
    assert list(corpus) == list(corpus) == ["one", "two"] + ["three"] * 9_000
    before = corpus.fingerprint()
    assert before == open_corpus([f"{server}/plain.txt", f"{server}/compressed.txt.gz"]).fingerprint()
    (tmp_path / "plain.txt").write_text("one\ntwo\nmore\n")
    assert before != open_corpus([f"{server}/plain.txt", f"{server}/compressed.txt.gz"]).fingerprint()
    with pytest.raises(FileNotFoundError, match=f"{server}/none.txt"):
        open_corpus(f"{server}/none.txt")
    with pytest.raises(ValueError, match=f"{server}/truncated.txt.gz is truncated"):
        list(open_corpus(f"{server}/truncated.txt.gz"))


def test_proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A proxy of the environment is used: here it answers for a host that does not exist."
    (tmp_path / "http:" / "nowhere.invalid").mkdir(parents=True)
    (tmp_path / "http:" / "nowhere.invalid" / "a.txt").write_text("one\n")
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    assert list(open_corpus("http://nowhere.invalid/a.txt")) == ["one"]


@pytest.mark.parametrize("address, package", [("s3://bucket/a.txt", "s3fs"), ("https://example.org/a.txt", "aiohttp")])
def test_missing_package_is_named(address: str, package: str):
    "The error for a protocol whose package is missing has the command that installs it."
    absent = {package: None, "fsspec.implementations.http": None}
    with patch.dict(sys.modules, absent), patch.dict("fsspec.registry._registry", clear=True):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            open_corpus(address)


def test_other_missing_package():
    "Its name need not be that of the protocol, so the error has what fsspec says."
    absent = {"requests": None, "fsspec.implementations.webhdfs": None}
    with patch.dict(sys.modules, absent), patch.dict("fsspec.registry._registry", clear=True):
        with pytest.raises(ImportError, match=r"needs another package \(.*requests"):
            open_corpus("webhdfs://host/a.txt")
