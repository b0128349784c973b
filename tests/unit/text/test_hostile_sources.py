"Hostile or broken sources end in an error that names them, within bounded time and memory."

import errno
import glob
import gzip
import http.server
import io
import lzma
import os
import random
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from unittest.mock import Mock, patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from nasty_files import COMPRESS

from langmlm.text import files
from langmlm.text.corpus import open_corpus
from langmlm.text.files import SourceFile, find_files


def read(source, **options) -> list[str]:
    "All documents of a source."
    return list(open_corpus(source, **options))


# Decompression


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_decompression_bomb(form: str, compression: str, tmp_path: Path):
    "A small file that becomes a huge one is an error, for text in memory and for a table on its way to the disk."
    bomb = tmp_path / f"bomb.{form}.{compression}"
    bomb.write_bytes(COMPRESS[compression](bytes(2**22)))
    message = f"{bomb} decompresses to more than 200 times its size.*decompress it yourself"
    with patch.object(files, "_SMALL_SIZE", 2**20), pytest.raises(ValueError, match=message):
        read(bomb)
    if form == "txt":
        assert read(bomb) == ["\0" * 2**22]  # Too small to do any harm


def test_real_bomb_stops_at_the_limit(tmp_path: Path):
    "A bomb of 1.3 GB is an error before it has filled the memory."
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(2**26)) * 20)
    with pytest.raises(ValueError, match="decompresses to more than 200 times its size"):
        open_corpus(tmp_path / "bomb.txt.gz")


@pytest.mark.parametrize("compression", COMPRESS)
def test_large_text_is_no_bomb(compression: str, tmp_path: Path):
    "The limit is a ratio, so that ordinary text of any size stays below it."
    draw = random.Random(0)
    words = ["storm", "flood", "bridge", "closed", "roads", "coast"]
    text = "\n".join(" ".join(draw.choices(words, k=20)) for _ in range(3_000))
    (tmp_path / f"a.txt.{compression}").write_bytes(COMPRESS[compression](text.encode()))
    with patch.object(files, "_SMALL_SIZE", 2**10):
        assert read(tmp_path / f"a.txt.{compression}") == text.split("\n")


def test_xz_with_a_huge_dictionary(tmp_path: Path):
    "An xz file cannot ask for gigabytes of memory before it gives a byte."
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**16}]
    data = bytearray(lzma.compress(b"storm\n", filters=filters))
    at = data.index(bytes([0x21, 1, 8]))  # LZMA2, one byte of properties, 2^16: the code of the dictionary's size
    data[at + 2] = 39  # 3 GB
    header = data[12 : 12 + 4 * (data[12] + 1) - 4]
    data[12 + len(header) : 16 + len(header)] = struct.pack("<I", zlib.crc32(header))
    (tmp_path / "a.txt.xz").write_bytes(data)
    with pytest.raises(ValueError, match="a.txt.xz needs too much memory to decompress: compress it again .* xz -dc FILE"):
        read(tmp_path / "a.txt.xz")


def test_parquet_bomb(tmp_path: Path):
    "A column that decompresses to far more than its size is an error before it is read."
    draw = random.Random(0)
    texts = ["x" * 2**20 + str(draw.random()) for _ in range(8)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert read(tmp_path / "a.parquet") == texts
    with (
        patch.object(files, "_SMALL_SIZE", 2**20),
        pytest.raises(ValueError, match="a.parquet decompresses to more than 200 times"),
    ):
        read(tmp_path / "a.parquet")


def test_absurd_sizes_in_tables(tmp_path: Path):
    "Lengths in Parquet and Arrow files that the content does not have are errors."
    sink = io.BytesIO()
    with pa.ipc.new_stream(
        sink, pa.schema({"text": pa.string()}), options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(pa.table({"text": ["storm " * 1_000]}))
    data = sink.getvalue()
    length = struct.pack("<q", 6_000)  # In front of the compressed buffer
    assert data.count(length) >= 1
    for size in (2**40, 2**62, -7):
        (tmp_path / "a.arrow").write_bytes(data.replace(length, struct.pack("<q", size)))
        with pytest.raises(ValueError, match="a.arrow"):
            read(tmp_path / "a.arrow")
    pq.write_table(pa.table({"text": ["storm " * 1_000]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    for size in (2**31 - 1, -5):
        (tmp_path / "a.parquet").write_bytes(data[:-8] + struct.pack("<i", size) + b"PAR1")
        with pytest.raises(ValueError, match="a.parquet is truncated, damaged"):
            read(tmp_path / "a.parquet")


def test_errors_of_the_operating_system_are_kept(tmp_path: Path):
    "A disk that cannot be read is no damaged file: the error keeps its class and number, and names the file."
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"storm\n"))

    class BrokenDisk(io.FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

        def read(self, size=-1):
            return self.readinto(None)

    for name in ("a.txt.gz", "a.txt", "a.parquet"):
        (tmp_path / name).touch()
        source = SourceFile(str(tmp_path / name), *files.detect_format(name))
        with patch.object(SourceFile, "_open_stored", lambda self: BrokenDisk(self.name)):
            with pytest.raises(OSError, match=re.escape(name)) as caught, source.open() as stream:
                stream.read(9)
        assert caught.value.errno == errno.EIO and type(caught.value) is OSError


def test_full_temporary_disk(tmp_path: Path):
    "The disk that is full is that of the temporary files, and the error says so."
    pq.write_table(pa.table({"text": ["storm"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))

    class FullDisk(io.BytesIO):
        def writelines(self, blocks):
            raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(files.tempfile, "TemporaryFile", lambda prefix: FullDisk()), pytest.raises(OSError) as caught:
        read(tmp_path / "a.parquet.gz")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == files.tempfile.gettempdir()


# Archives


@pytest.mark.parametrize("member", ["../../up.txt", "/tmp/absolute.txt", "a.txt"])
@pytest.mark.parametrize("url", ["{kind}://{member}::file://{path}", "{kind}://*.txt::file://{path}", "{path}"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_errors(kind: str, url: str, member: str, tmp_path: Path):
    "Nothing is ever extracted: archives are errors by name and as URLs, whatever the names of their members."
    path = tmp_path / f"all.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, "storm\n")
    else:
        with tarfile.open(path, "w") as archive:
            for kind_of_member in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
                entry = tarfile.TarInfo(member)
                entry.type, entry.linkname = kind_of_member, "/etc/passwd"
                archive.addfile(entry)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="names an archive.*extract it, and pass the folder"):
        read(url.format(kind=kind, member=member, path=path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tbz2", "a.txz", "a.tar.zst", "a.7z", "a.rar"]
)
def test_archive_names(name: str, tmp_path: Path):
    "Every usual name of an archive is known, whatever is in the file."
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=f"names an archive, {name}"):
        find_files(tmp_path / name)


# Links, pipes and devices


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    "A folder with links to another folder, to itself, to its parent and to one of its files."
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("data/a.txt", "data/real/b.txt", "other/c.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    for name, target in {
        "data/elsewhere": "../other",
        "data/again": "real",
        "data/self": ".",
        "data/real/up": "..",
        "data/loop": "loop",
        "other/back": "../data",
        "data/z.txt": "a.txt",
    }.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("part", ["data", "data/**/*.txt", "{}/data", "~/data", "~/data/**/*.txt", "file://data"])
def test_linked_folders(tree: Path, part: str):
    "Linked folders are followed, loops end, and each real file is read once."
    with chdir(tree), patch.dict(os.environ, HOME=str(tree)):
        assert sorted(read(part.format(tree))) == ["data/a.txt", "data/real/b.txt", "other/c.txt"]
        assert [Path(file.name).name for file in find_files(part.format(tree))] == ["a.txt", "c.txt", "b.txt"]


def test_a_link_that_is_named_is_read(tree: Path):
    "A link is read under its own name if it is the only way to the file."
    assert read(tree / "data" / "z.txt") == ["data/a.txt"]
    assert [Path(file.name).name for file in find_files(tree / "data" / "?.txt")] == ["a.txt"]


def test_many_crossing_links(tmp_path: Path):
    "Twelve folders, each linked to all others, take a moment and not forever."
    names = [f"folder-{number:02}" for number in range(12)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{name}\n")
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    for part in (tmp_path, tmp_path / "**" / "*.txt", f"{tmp_path}/folder-0?/**/*.txt"):
        assert sorted(read(part)) == names


def test_globs_match_what_python_matches(tmp_path: Path):
    "Without links, a glob stands for the files that `glob.glob` finds."
    draw = random.Random(0)
    for _ in range(60):
        parts = draw.choices(["a", "b", ".c", "data"], k=draw.randrange(1, 4))
        path = tmp_path.joinpath(*parts, draw.choice(["x.txt", "y.csv", ".z.txt"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")
    for pattern in ("**", "**/*.txt", "a/**/*.txt", "*/**", "**/b/**/*", "[ab]/**/?.*", "**/.c/*", "**/.*", "*/*.txt"):
        with chdir(tmp_path):
            expected = sorted({Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()})
            assert [Path(file.name) for file in find_files(pattern)] == expected


@pytest.mark.parametrize("part", ["pipe.txt", "folder", "folder/*.txt", "folder/**/*.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "broken link"])
def test_special_files(kind: str, part: str, tmp_path: Path):
    "A pipe, a device or a broken link is an error with its name; it is neither waited for nor left out."
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("storm\n")
    for path in (tmp_path / "pipe.txt", tmp_path / "folder" / "pipe.txt"):
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "nowhere.txt")
    problem = "is a broken link" if kind == "broken link" else "is not a regular file"
    with pytest.raises(OSError, match=f"pipe.txt {problem}"):
        find_files(tmp_path / part)


def test_folder_that_cannot_be_listed(tmp_path: Path):
    "A folder without permission is an error, unless it is hidden."
    for name in ("data/a.txt", "data/closed/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("storm\n")
    scandir = os.scandir

    def no_permission(path):
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with patch.object(os, "scandir", no_permission):
        for folder in ("data", "data/closed"):
            with pytest.raises(PermissionError, match="data/closed"):
                find_files(tmp_path / folder)
        (tmp_path / "data" / "closed").rename(tmp_path / "data" / ".closed")
        assert len(find_files(tmp_path / "data")) == 1


def test_file_without_permission(tmp_path: Path):
    "A file that may not be opened is an error with its name."
    (tmp_path / "a.txt").write_text("storm\n")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.txt"))
    with patch.object(SourceFile, "_open_stored", side_effect=denied), pytest.raises(PermissionError, match="a.txt"):
        open_corpus(tmp_path / "a.txt")


@pytest.mark.parametrize("change", ["grow", "shrink"])
def test_file_that_changes(change: str, tmp_path: Path):
    "A file that grows or shrinks while it is read would give other documents in every pass: it is an error."
    path = tmp_path / "log.txt"
    path.write_text("storm\n" * 100_000)
    documents = iter(corpus := open_corpus(path))
    next(documents)
    with open(path, "r+") as file:
        file.truncate(6 if change == "shrink" else 700_000)
    for attempt in (documents, iter(corpus)):  # In the same pass, and in the next
        with pytest.raises(ValueError, match=r"log.txt has changed .* 600,000 bytes, and has .* copy"):
            list(attempt)


# Names


@pytest.mark.parametrize(
    "name", ["line\nbreak.txt", b"caf\xe9.txt", "[a].txt", "~a.txt", "a b.txt", "%41.txt", "-.txt"]
)
def test_names(name: str | bytes, tmp_path: Path):
    "A file may have any name that the file system accepts."
    with chdir(tmp_path):
        with open(name, "w") as file:
            file.write("storm\n")
        corpus = open_corpus(os.fsdecode(name))
        assert list(corpus) == ["storm"] and corpus.fingerprint() == open_corpus(".").fingerprint()


@pytest.mark.parametrize("name", ["storm " * 2_000, "a\0b", "~no-such-user/a.txt"])
def test_text_instead_of_a_name(name: str):
    "A text, or a name that no file can have, is an error of bounded length with the remedy."
    with pytest.raises(FileNotFoundError, match=r"there is no such file.*iter\(\[...\]\)") as caught:
        open_corpus(name)
    assert len(str(caught.value)) < 1_000


def test_empty_name():
    "An empty string is not the current folder."
    for part in ("", [""]):
        with pytest.raises(ValueError, match="data_path is an empty string"):
            open_corpus(part)


def test_home_folder(tmp_path: Path):
    "`~` is the home folder, in strings and paths, alone and in lists, for files, folders, globs and saved datasets."
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("storm\n")
    Dataset.from_dict({"text": ["flood"]}).save_to_disk(tmp_path / "saved")
    with patch.dict(os.environ, HOME=str(tmp_path)):
        for part in ("~/a.txt", Path("~/a.txt"), "~/*.txt", ["~/a.txt"], [Path("~/a.txt")], "file://~/a.txt"):
            assert read(part) == ["storm"]
        assert read("~/saved") == read(Path("~/saved")) == ["flood"]


# Web servers


class Handler(http.server.SimpleHTTPRequestHandler):
    "A server that misbehaves as the path says."

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(b"storm\n" * 100)

    def answer(self, body: bytes):
        kind = self.path.strip("/").removesuffix(".gz").removesuffix(".txt")
        targets = {
            "to-file": "file:///etc/passwd",
            "to-ftp": "ftp://127.0.0.1/a.txt",
            "loop": "/loop.txt",
            "to-fine": "/fine.txt",
        }
        packed = gzip.compress(b"storm\n" * 100)
        headers = {
            "short": {"Content-Length": "10000"},
            "error": {"Content-Length": "0"},
            "encoded": {"Content-Length": str(len(packed)), "Content-Encoding": "gzip"},
        }.get(kind, {"Content-Length": "600"})
        if kind in targets:
            headers, body = {"Location": targets[kind], "Content-Length": "0"}, b""
        self.send_response(302 if kind in targets else 500 if kind == "error" else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body and kind not in targets and kind != "error":
            self.wfile.write(packed if kind == "encoded" else body)
        self.close_connection = kind == "short"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    "The address of the server."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_redirects(server: str):
    "A redirect to another page of the web is followed; one to another scheme, or without an end, is an error."
    assert read(f"{server}/to-fine.txt") == ["storm"] * 100
    for kind in ("to-file", "to-ftp", "loop", "error"):
        with pytest.raises(OSError, match=f"{server}/{kind}.txt") as caught:
            read(f"{server}/{kind}.txt")
        assert {"to-file": "NonHttpUrl", "to-ftp": "NonHttpUrl", "loop": "TooManyRedirects", "error": "500"}[
            kind
        ] in str(caught.value)


def test_redirect_without_encryption():
    "A redirect from https to http is an error."
    web = Mock(unstrip_protocol=str)
    web.info.return_value = {"size": 9, "url": "http://example.org/a.txt"}
    with patch.object(files, "url_to_fs", lambda url, **options: (web, url)):
        with pytest.raises(ValueError, match="https://example.org/a.txt redirects to http://example.org/a.txt"):
            find_files("https://example.org/a.txt")
        assert find_files("http://example.org/a.txt")[0].size == 9


def test_answer_that_ends_early(server: str):
    "A connection that ends before the announced size is an error with the address; it is no damaged file."
    for name in ("short.txt", "short.txt.gz"):
        with pytest.raises(OSError, match=f"reading {server}/{name} failed"):
            with patch("gzip.GzipFile", lambda fileobj: fileobj):
                read(f"{server}/{name}")


def test_content_encoding(server: str):
    "A server may call a compressed file encoded: it is decompressed once, by its name or by its encoding."
    assert read(f"{server}/encoded.txt.gz") == read(f"{server}/encoded.txt") == ["storm"] * 100


def test_slow_server_has_time(server: str):
    "The time for a whole file is not limited, only that between two pieces: large files are read for hours."
    filesystem, _ = url_to_fs(server, **files._web_options(server))
    timeout = filesystem.client_kwargs["timeout"]
    assert timeout.total is None and 0 < timeout.sock_read <= 600 and 0 < timeout.sock_connect <= 600


def test_remote_failure_names_the_source():
    "Errors of any class that a remote file system raises get the name of the file."
    MemoryFileSystem().pipe({"/broken/a.txt": b"storm\n"})
    (file,) = find_files("memory://broken/a.txt")

    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise RuntimeError("connection lost")

    with patch.object(MemoryFileSystem, "open", lambda *arguments: Broken()):
        with pytest.raises(OSError, match="reading memory:///broken/a.txt failed: RuntimeError: connection lost"):
            with file.open() as stream:
                stream.read(9)
