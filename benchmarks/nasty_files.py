"""Nasty files: read and tokenize files with odd text, compression and damage, and check every result.

    python benchmarks/nasty_files.py 1000 --write    # stores the counts in benchmarks/results/nasty_files.json

Each case is drawn from a seed: documents, a format, how the file is written and compressed, and perhaps damage. The
expected documents are known from the way the file was made, not from reading it. A damaged file has to raise an error
that names the file, and must leave nothing behind.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest.mock import patch

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from langmlm import tasks
from langmlm.text.corpus import docstrings, open_corpus
from langmlm.data.dataset import open_dataset
from langmlm.tokens.tokenizer import save_tokenizer, train_tokenizer
from langmlm.tokens.tokenizer import TokenizerConfig

RESULT = Path(__file__).parent / "results" / "nasty_files.json"
PIECES = [
    "storm", "flood", " ", "  ", ".", ",", '"', '""', "'", ";", "\t", "\\", "\\n", "{", "}", "[]", "<s>", "<mask>", "</s>", "é",
    "e\u0301", "ß", "日本語", "שלום", "👩‍👩‍👧‍👦", "🌊", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\0", "\x7f", "\ufeff", "\ufffd",
    "\u200b", "\U0010ffff", "\r", "@USER", "#", "null", "NaN", "-1", "://",
]  # fmt: skip
BAD_BYTES = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x8c", b"\x80", b"\xc0\xaf"]
COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data)),
}
NO_TEXT = "no text"  # In the error for a corpus of empty documents
FORMATS = ("txt", "txt", "txt", "jsonl", "json", "csv", "tsv", "parquet", "arrow")


@dataclass
class Case:
    "A file, how to read it, and the expected result."

    path: Path
    options: dict = field(default_factory=dict)
    documents: list[str] = field(default_factory=list)
    error: str | None = None  # Expected in the error message; None: no error
    block: int = 2**16  # Bytes read at a time; a few bytes put block boundaries everywhere
    kind: str = ""  # Counted in the result


def draw_text(rng: Random, line_ends: bool) -> str:
    "Draw a text of odd pieces, sometimes empty, only whitespace, or long."
    pieces = PIECES + ["\n", "\r\n", "\n\n"] if line_ends else PIECES
    text = "".join(rng.choices(pieces, k=rng.choice([0, 1, 1, 3, 10, 40])))
    if rng.random() < 0.02:
        text = (text + "x") * (300_000 // (len(text) + 1))
    return text


def is_empty(text: str) -> bool:
    "Return whether a text contains only whitespace."
    return not text.strip()


def damage(rng: Random, data: bytes) -> bytes:
    "Insert invalid UTF-8 between two characters."
    text = data.decode()
    position = rng.randrange(len(text) + 1)
    return text[:position].encode() + rng.choice(BAD_BYTES) + text[position:].encode()


def resolve(data: bytes, encoding_errors: str) -> list[str]:
    "Decode one document; none if it is skipped or an error."
    try:
        return [data.decode()]
    except UnicodeDecodeError:
        return [data.decode("utf-8", "replace")] if encoding_errors == "replace" else []


def text_file(rng: Random, case: Case) -> bytes:
    "Write a text file of lines, paragraphs or one document."
    document = rng.choice(["line", "line", "blank-line", "file"])
    errors = rng.choice(["strict", "strict", "replace", "skip"])
    case.options |= {"document": document, "encoding_errors": errors}
    bad = rng.random() < 0.3
    raw, expected = [], []
    for _ in range(rng.choice([1, 3, 30])):
        lines = [draw_text(rng, False) for _ in range(1 if document == "line" else rng.randrange(1, 4))]
        if document == "blank-line":
            lines = [line if not is_empty(line) else "." for line in lines]
        data = [damage(rng, line.encode()) if bad and rng.random() < 0.3 else line.encode() for line in lines]
        if document == "blank-line":
            data = [line if line.strip() else b"." for line in data] + [rng.choice([b"", b" ", b"\t\x0b"])]
        raw += data
        expected.append(b"\n".join(data[:-1] if document == "blank-line" else data))
    ends = [b"\r\n" if line.endswith(b"\r") or rng.random() < 0.4 else b"\n" for line in raw]
    content = b"".join(line + end for line, end in zip(raw, ends))
    if rng.random() < 0.3 and raw[-1]:
        content = content.removesuffix(ends[-1])
    if rng.random() < 0.3 or content.startswith(b"\xef\xbb\xbf"):
        content = b"\xef\xbb\xbf" + content
    if document == "file":
        expected = [b"\n".join(raw)]
    if errors == "strict" and any(not resolve(data, "strict") for data in raw):
        case.error = "is not UTF-8"
    case.documents = [text for data in expected for text in resolve(data, errors)]
    return content


def table_file(rng: Random, case: Case, form: str) -> bytes:
    "Write a table with a text column and others."
    column = rng.choice(["text", "text", "body", 'text,"1"', "naïve"])
    case.options |= {"text_column": column, "encoding_errors": rng.choice(["strict", "replace"])}
    texts = [draw_text(rng, True) for _ in range(rng.choice([1, 3, 30]))]
    if form in ("csv", "tsv"):
        case.documents = [text.replace("\r\n", "\n") for text in texts]
        return csv_file(rng, column, texts, "," if form == "csv" else "\t")
    texts = [None if rng.random() < 0.1 else text for text in texts]
    case.documents = [text for text in texts if text is not None]
    if form in ("json", "jsonl"):
        return json_file(rng, column, texts, form)
    kind = rng.choice([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    table = pa.table({"id": range(len(texts)), column: pa.array(texts, kind), "tags": [["a", "b"]] * len(texts)})
    sink = io.BytesIO()
    if form == "parquet":
        compression = rng.choice(["snappy", "zstd", "none"])
        pq.write_table(table, sink, row_group_size=rng.choice([1, 1_000]), compression=compression)
    elif rng.random() < 0.5:
        feather.write_feather(table, sink, compression=rng.choice(["uncompressed", "lz4"]), chunksize=7)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def csv_file(rng: Random, column: str, texts: list[str], delimiter: str) -> bytes:
    "Write CSV, quoted as little as possible, or everywhere."
    sink = io.StringIO(newline="")
    returns = any("\r" in text for text in texts)
    quoting = csv.QUOTE_ALL if returns or rng.random() < 0.5 else csv.QUOTE_MINIMAL
    writer = csv.writer(sink, delimiter=delimiter, quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"]))
    before = rng.random() < 0.5
    writer.writerow(["id", column] if before else [column, "id"])
    writer.writerows([[number, text] if before else [text, number] for number, text in enumerate(texts)])
    return (b"\xef\xbb\xbf" if rng.random() < 0.3 else b"") + sink.getvalue().encode()


def json_file(rng: Random, column: str, texts: list[str | None], form: str) -> bytes:
    "Write JSON lines, an array, or consecutive objects."
    rows = [{"id": number, column: text, "more": {"text": "no"}} for number, text in enumerate(texts)]
    ascii_only, end = rng.random() < 0.5, rng.choice(["\n", "\r\n", "\n\n"])
    if form == "json" and rng.random() < 0.7:
        content = json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice([None, 2]))
    else:
        content = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + rng.choice(["", end])
    return (b"\xef\xbb\xbf" if rng.random() < 0.3 else b"") + content.encode()


def make_invalid(rng: Random, case: Case, form: str, content: bytes) -> bytes:
    "Make the content of a file invalid."
    wide = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    if form == "txt":
        case.error, case.kind = "is in UTF-", case.kind + " wide"
        return "A plain text of some length.\nIn two lines.\n".encode(wide)
    case.kind += " invalid"
    if form in ("parquet", "arrow"):
        case.error = "truncated"
        return content[: rng.randrange(1, len(content) - 9)]
    column = case.options["text_column"]
    if rng.random() < 0.3:
        case.options["text_column"], case.error = "nowhere", "'nowhere'"
    elif form in ("csv", "tsv"):
        case.error = "line"
        bad = [b'"never closed', b"one,two,three,four\tfive\tsix\t"]
        bad += [b'1,"closed" early\t"closed" early', b"\xff,\xff\t\xff"]
        if case.options["encoding_errors"] != "strict":
            bad.pop()
        content += b"\r\n" + rng.choice(bad)
    else:
        case.error = ""
        bad = [b"{", b'{"text": 1,,}', b"[1]", b"nonsense", b'{"other": "text"}', b'{"te\xff']
        bad.append(json.dumps({column: 5}).encode())
        content += b"\n" + rng.choice(bad)
    return content


def make_file(rng: Random, folder: Path, name: str) -> Case:
    "Write one file: draw its documents, format, errors and compression."
    form = rng.choice(FORMATS)
    case = Case(folder / f"{name}.{form}", block=rng.choice([5, 64, 2**16]), kind=form)
    content = text_file(rng, case) if form == "txt" else table_file(rng, case, form)
    if rng.random() < 0.2:
        content = make_invalid(rng, case, form, content)
    if rng.random() < 0.4:
        compression = rng.choice(list(COMPRESS))
        compress = COMPRESS[compression]
        middle = rng.randrange(len(content) + 1) if rng.random() < 0.3 else 0
        first = compress(content[:middle]) if middle else b""
        compressed = first + compress(content[middle:])
        if rng.random() < 0.15:
            compressed, case.error = compressed[: rng.randrange(1, len(compressed))], ""  # Any error: what is met first
            if middle and len(compressed) == len(first):
                compressed = compressed[:-1]
            case.kind += " truncated"
        elif middle and rng.random() < 0.3:
            compressed, case.error = first + b"X" + compressed[len(first) + 1 :], ""
            case.kind += " damaged"
        content, case.path = compressed, case.path.with_name(f"{case.path.name}.{compression}")
        case.kind += f".{compression}"
    if rng.random() < 0.03:
        content, case.error, case.kind = b"", "names empty files", "empty file"
    case.documents = [text for text in case.documents if not is_empty(text)]
    if case.error is None and not case.documents:
        case.error, case.kind = NO_TEXT, "no text"
    case.path.write_bytes(content)
    return case


def read_case(case: Case, tokenizer: Path, target: Path, with_dataset: bool) -> list[list[str]]:
    "Read the documents of a case twice; make their dataset if wanted, or if an error is expected."
    with ExitStack() as stack:
        if len(case.documents) < 100 and max(map(len, case.documents), default=0) < 10_000:
            stack.enter_context(patch("langmlm.text.files._BLOCK", case.block))
        corpus = open_corpus(case.path, **case.options)
        read = [list(corpus), list(corpus)]
        if with_dataset or case.error is not None:
            config = {"path_to_save_dataset": target, "max_length": 32, **case.options}
            tasks.create_tokenizer(case.path, config, tokenizer=tokenizer).train()
    return read


def find_problem(case: Case, tokenizer: Path, folder: Path, with_dataset: bool = True) -> str | None:
    "Read a case and return what is wrong with the result; None: nothing."
    target = folder / "made" / "dataset"
    try:
        read = read_case(case, tokenizer, target, with_dataset)
    except (ValueError, FileNotFoundError) as error:
        if case.error is None:
            return f"unexpected error: {error}"
        names_file = case.error == NO_TEXT or case.path.name in str(error)
        if not names_file or case.error not in str(error):
            return f"error without the file name or {case.error!r}: {error}"
        left = [path.name for path in target.parent.rglob("*")] if target.parent.exists() else []
        return f"files left behind: {left} {temporary_files()}" if left or temporary_files() else None
    if case.error is not None:
        return f"no error, expected {case.error!r}"
    if read != [case.documents, case.documents]:
        return f"read {read[0]!r:.300} instead of {case.documents!r:.300}"
    if not with_dataset:
        return None
    dataset, loaded = open_dataset(target), AutoTokenizer.from_pretrained(tokenizer)
    content = [token for row in range(len(dataset)) for token in dataset[row][1:-1].tolist()]
    return None if loaded.decode(content) == "".join(case.documents) else "the dataset does not decode to the documents"


@contextmanager
def own_temporary_files(folder: Path) -> Iterator[None]:
    "Within the context, temporary files go to a folder of their own."
    folder.mkdir()
    with patch.object(tempfile, "tempdir", str(folder)):
        yield


def temporary_files() -> set[str]:
    "Return the names of the temporary files that exist now."
    return {path.name for path in Path(tempfile.gettempdir()).iterdir()}


def run(cases: int, seed: int, tokenizer: Path, datasets: int = 1) -> tuple[Counter, list[str]]:
    "Make and check files, every `datasets`-th with its dataset; return counts by kind and result, and problems."
    counts, problems = Counter(), []
    for number in range(cases):
        with tempfile.TemporaryDirectory() as folder, own_temporary_files(Path(folder) / "temporary"):
            case = make_file(Random(f"{seed}/{number}"), Path(folder), f"nasty-{number}")
            problem = find_problem(case, tokenizer, Path(folder), with_dataset=number % datasets == 0)
        counts["errors" if case.error is not None else "read"] += 1
        counts[case.kind] += 1
        if problem:
            problems.append(f"case {number} ({case.kind}): {problem}")
    return counts, problems


def main() -> int:
    "Run the number of cases given on the command line; return 1 if one of them was read wrongly."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=int, nargs="?", default=1_000, help="number of files")
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # One per file with nulls or invalid UTF-8
    cases, began = arguments.files, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_tokenizer(docstrings(), TokenizerConfig(vocab_size=1_000)), Path(folder) / "tokenizer")
        counts, problems = run(cases, seed=0, tokenizer=Path(folder) / "tokenizer")
    print("\n".join(problems))
    outcome = {"files": cases, "read": counts.pop("read"), "errors": counts.pop("errors"), "wrong": len(problems)}
    print(outcome, f"{time.monotonic() - began:.0f} s")
    if arguments.write:
        RESULT.write_text(json.dumps(outcome | {"kinds": dict(sorted(counts.items()))}, indent=2) + "\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
