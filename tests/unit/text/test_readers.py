"Every format gives back the texts that were written, or an error that names the file and the line."

import json
import math
from collections import Counter
from functools import partial
from io import BytesIO
from random import Random
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nasty_files import csv_file, is_empty, json_file

from langmlm.text import readers
from langmlm.text.corpus import open_corpus
from langmlm.text.files import FORMATS
from langmlm.text.files import TABLES, _read_blocks
from langmlm.text.readers import (
    DOCUMENTS,
    EMPTY,
    ENCODING_ERRORS,
    ReadOptions,
    check_text_column,
    detect_wide_encoding,
    drop_empty_documents,
    extract_texts,
    read_column,
    read_texts,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def read(data: bytes, form: str = "txt", block: int = 2**16, counts: Counter | None = None, **options) -> list[str]:
    "The documents in a file, read in small blocks."
    counts = Counter() if counts is None else counts
    with patch("langmlm.text.files._BLOCK", block):
        source = BytesIO(data) if form in TABLES else _read_blocks(BytesIO(data))
        texts = read_texts(source, form, "a.txt", ReadOptions(**options), counts)
        return list(drop_empty_documents(texts, counts))


def fails(message: str, *arguments, **options) -> None:
    "Check that reading fails with a message."
    with pytest.raises(ValueError) as caught:
        read(*arguments, **options)
    assert message in str(caught.value)


def test_options():
    "Every unit of documents is accepted, and nothing else."
    assert {ReadOptions(document=document).encoding_errors for document in DOCUMENTS} == {ENCODING_ERRORS[0]}
    with pytest.raises(ValueError, match="document must be one of line, blank-line, file, got 'page'"):
        ReadOptions(document="page")


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.lists(TEXT).map("\r\n".join).map(str.encode)), block=st.integers(1, 9))
@example(data=b"a\r\n\r\rb\r", block=1)
@example(data=b"PK\x03\x04", block=1)
@example(data="\ufeff\ufeffé\n".encode(), block=3)
def test_any_bytes(data: bytes, block: int):
    "Bytes are split into lines and decoded, or the first invalid byte is named; nothing else happens to them."
    if detect_wide_encoding(data):
        with pytest.raises(ValueError, match="a.txt is in UTF-"):
            read(data)
        return
    if data.startswith(tuple(readers._MAGIC)):
        with pytest.raises(ValueError, match="a.txt is not UTF-8 .it seems to be a"):
            read(data, encoding_errors="replace")
        return
    raw = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    replaced = [line.decode("utf-8", "replace") for line in raw]
    assert read(data, encoding_errors="replace") == [line for line in replaced if not is_empty(line)]
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        location = f"line {before.count(10) + 1}, byte {len(before) - before.rfind(10)} of the line"
        fails(f"a.txt, {location}: {data[error.start]:#04x} is not UTF-8", data, block=block)
    else:
        lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        assert read(data, block=block) == [line for line in lines if not is_empty(line)]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, min_size=1), seed=st.integers(0, 99), block=st.integers(1, 20))
def test_tables_give_back_what_was_written(texts: list[str], seed: int, block: int):
    "CSV and JSON hold any text, and give it back; in CSV a line end within a text becomes a newline."
    kept = [text for text in texts if not is_empty(text)]
    assert read(json_file(Random(seed), "text", texts, "jsonl"), "jsonl", block) == kept
    assert read(json_file(Random(seed), "text", texts, "json"), "json", block) == kept
    table = csv_file(Random(seed), "text", texts, ",")
    assert read(table, "csv", block) == [text.replace("\r\n", "\n") for text in kept]


RUSSIAN, HINDI = "Штормовое предупреждение на побережье", "तट पर तूफ़ान की चेतावनी, घर में रहें"


def test_wide_encodings():
    "UTF-16 and UTF-32 are detected with and without a byte order mark, and nothing else is taken for them."
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        for text in ("Sturm über der Küste, bleibt zu Hause!", "\ufeffmarked, and short", RUSSIAN, HINDI):
            assert detect_wide_encoding(text.encode(encoding)) == encoding
    narrow = (b"", b"a\0b", "日本語のテキスト、長い。".encode(), b"\0" * 40, RUSSIAN.encode(), HINDI.encode(), b"a-b-c-d-e-f-g-h-i-j-")
    assert [detect_wide_encoding(head) for head in narrow] == [None] * 7
    fails("a.txt is in UTF-16BE: convert it first, for instance: iconv -f UTF-16BE", b"\xfe\xff\0a")
    fails("UTF-16LE", "fine".encode("utf-16"), encoding_errors="skip")


def test_lines():
    "Only newlines, with or without a carriage return, end a line."
    text = "first\nwith\x0cform feed\u2028and\x85more\r\nlone\rreturn, nul\0\n\n  spaces  \r\r\nlast"
    assert read(text.encode()) == [line for line in text.replace("\r\n", "\n").split("\n") if line]
    assert read("\ufeffmarked \ufeffonce\n".encode()) == ["marked \ufeffonce"]
    long_line = "x" * (2**16 + 2**22 + 5)
    assert read(f"one\n{long_line}\nlast".encode()) == ["one", long_line, "last"]


LATIN = "fine\n".encode() + "café au lait\n".encode("latin-1")


def test_invalid_utf8():
    "Invalid UTF-8 is an error with file, line and byte, or it is replaced or skipped, and counted."
    fails("a.txt, line 2, byte 4 of the line: 0xe9 is not UTF-8", LATIN)
    fails("line 1, byte 7 of the line", "\ufeff".encode() + LATIN[5:])
    fails("a.txt, line 4, byte 2 of the line: 0xff is not UTF-8", b"one\ntwo\n\nx\xff")
    counts = Counter()
    assert read(LATIN + b"\n \nend", encoding_errors="skip", counts=counts) == ["fine", "end"]
    assert counts == {"documents with invalid UTF-8 skipped": 1, EMPTY: 2}
    assert read(LATIN, encoding_errors="replace") == ["fine", "caf� au lait"]
    counts = Counter()
    assert read(LATIN, document="file", encoding_errors="replace", counts=counts) == ["fine\ncaf� au lait"]
    assert counts == {"documents with invalid UTF-8 replaced by �": 1}


def test_document_units():
    "A document is a line, a paragraph or a file; only whitespace is no document."
    poem = "  Tyger Tyger,\r\nburning bright\r\n \r\n\r\nIn the forests\r\nof the night\r\n".encode()
    assert read(poem) == ["  Tyger Tyger,", "burning bright", "In the forests", "of the night"]
    assert read(poem, document="file") == ["  Tyger Tyger,\nburning bright\n \n\nIn the forests\nof the night"]
    paragraphs = ["  Tyger Tyger,\nburning bright", "In the forests\nof the night"]
    assert read(poem, document="blank-line") == paragraphs
    assert read(b" \n\t\n", document="file") == []


def test_rows():
    "A null is skipped; what is no text, and a missing column, are errors."
    counts = Counter()
    assert list(extract_texts([(2, "fine"), (3, None)], "a.csv, line", ReadOptions(), counts)) == ["fine"]
    assert counts == {"rows with null text skipped": 1}
    with pytest.raises(ValueError, match="a.jsonl, line 4: 'text' must be text, got int"):
        list(extract_texts([(4, 5)], "a.jsonl, line", ReadOptions(), counts))
    with pytest.raises(ValueError, match=r"no column 'text' \(set text_column\), only \['id', 'body'\]"):
        check_text_column(["id", "body"], "a.csv", "text")
    with pytest.raises(ValueError, match=r"more than one column 'text' \(set text_column\): \['text', 'text'\]$"):
        check_text_column(["text", "text"], "a.csv", "text")


ROWS = [{"id": 1, "text": 'two\nlines, "quoted"\r\n'}, {"id": 2, "text": None}, {"id": 3, "text": "flood 🌊 \u2028\0"}]
TEXTS = [ROWS[0]["text"], ROWS[2]["text"]]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()


def test_json_lines():
    "One object per line; errors name the line, and the character of invalid JSON."
    counts = Counter()
    assert read("\ufeff".encode() + LINES + b"\n\n", "jsonl", counts=counts) == TEXTS
    assert counts == {"rows with null text skipped": 1}
    assert read(LINES.replace(b'"text"', b'"body"'), "jsonl", text_column="body") == TEXTS
    fails("a.txt, line 4, character 2 of the line: cannot parse JSON", LINES + b"\n{'text'}", "jsonl")
    fails("line 4: a row must be an object", LINES + b"\n[1, 2]", "jsonl")
    fails("line 1: there is no column 'body'", LINES, "jsonl", text_column="body")
    fails("line 1, byte 11 of the line: 0xe9 is not UTF-8", b'{"text": "\xe9"}', "jsonl")
    fails("line 1: U+D83C is an unpaired surrogate", b'{"text": "\\ud83c"}', "jsonl")
    fails("line 1: cannot parse JSON", b"[" * 100_000, "jsonl")
    fails("line 1: cannot parse JSON", b'{"text": ' + b"9" * 5_000 + b"}", "jsonl")
    assert read(b'{"text": "\xe9 \\ud83c"}', "jsonl", encoding_errors="replace") == ["� �"]


REPEATED = [
    b'{"text": "first", "text": "second"}',
    b'{"text": "first", "id": {"text": 1}, "t\\u0065xt": "second"}',
    b'{"text": null, "text": "second"}',
]


@pytest.mark.parametrize("row", REPEATED)
def test_repeated_json_key(row: bytes):
    "Two texts in one object are an error with file and line: JSON readers would keep the last of them."
    fails("a.txt, line 2: there is more than one column 'text'", b'{"text": "fine"}\n' + row, "jsonl")
    fails("a.txt, row 2: there is more than one column 'text'", b'[{"text": "fine"},\n' + row + b"]", "json")


def test_other_repeated_json_keys():
    "Repeated keys that hold no text of a document do not matter."
    rows = b'{"id": 1, "id": 2, "text": "storm", "more": {"text": 1, "text": 2}}\n{"text": "flood"}'
    assert read(rows, "jsonl") == read(rows, "json") == ["storm", "flood"]


def test_byte_order_mark_inside_a_file():
    "Files with byte order marks that were concatenated: text keeps its characters, and JSON names the mark."
    assert read("one\n\ufefftwo\n".encode()) == ["one", "\ufefftwo"]
    rows = '{"text": "one"}\n\ufeff{"text": "two"}\n'.encode()
    fails("a.txt, line 2, character 1 of the line: cannot parse JSON (a byte order mark inside the file", rows, "jsonl")
    fails("a.txt, row 2: a row must be an object such as {...}, got '\\ufeff'", rows, "json")


@pytest.mark.parametrize(
    "data, kind",
    [(b"\x1f\x8b\x08\0", "gzip"), (b"PK\x03\x04\x14", "zip"), (b"PAR1\x15\x04", "Parquet"), (b"ARROW1\0\0", "Arrow"),
     (b"BZh91AY&SY", "bz2"), (b"%PDF-1.4\n", "PDF")],
)  # fmt: skip
def test_binary_file_with_the_name_of_a_text(data: bytes, kind: str):
    "A binary file that is called .txt is named as what it is; text that begins with the same letters is text."
    for mode in ENCODING_ERRORS:
        fails(f"is not UTF-8 (it seems to be a {kind} file: give it", data + b"\xff\xfe\xfd" * 9, encoding_errors=mode)
    assert read(b"PAR1 is the first word\n") == ["PAR1 is the first word"]


@pytest.mark.parametrize("kind", ["dict", "pandas", "arrow", "batch"])
def test_columns(kind: str):
    "The text column of a table in memory is read; a missing value of any kind is no text."
    columns = {"id": [1, 2, 3, 4], "text": ["storm", None, float("nan"), "flood 🌊"]}
    if kind == "dict":
        columns["text"][2] = None
    tables = {
        "dict": dict,
        "pandas": pd.DataFrame,
        "arrow": partial(pa.Table.from_pydict),
        "batch": pa.RecordBatch.from_pydict,
    }
    if kind in ("arrow", "batch"):
        columns["text"][2] = None
    table = tables[kind](columns)
    assert list(read_column(table, ReadOptions())) == ["storm", None, None, "flood 🌊"]
    with pytest.raises(ValueError, match=r"no column 'body' \(set text_column\), only \['id', 'text'\]"):
        read_column(table, ReadOptions("body"))


def test_invalid_bytes_in_a_table_in_memory():
    "Arrow does not check its strings: `encoding_errors` holds for them, too."
    data, offsets = pa.py_buffer(b"finecaf\xe9"), pa.py_buffer(np.array([0, 4, 8], np.int32))
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})
    for source in (table, table.to_batches()[0]):
        with pytest.raises(ValueError, match=r"data_path \(.*\), row 2, byte 4 of the text: 0xe9 is not UTF-8"):
            open_corpus(source)
        assert list(open_corpus(source, encoding_errors="replace")) == ["fine", "caf�"]
        assert list(open_corpus(source, encoding_errors="skip")) == ["fine"]


def test_data_frames():
    "A data frame trains on its texts, again and again, and errors name the row; so does every kind of missing value."
    frame = pd.DataFrame({"column_names": [1, 2], "id": [1, 2], "text": ["storm", "flood"]}, index=[7, 3])
    corpus = open_corpus(frame)
    assert list(corpus) == list(corpus) == ["storm", "flood"]
    assert list(open_corpus(frame[["id", "text"]].rename(columns={"text": "body"}), text_column="body")) == [
        "storm",
        "flood",
    ]
    missing = pd.DataFrame({"text": pd.Series(["storm", None, pd.NA, float("nan"), pd.NaT], dtype=object)})
    corpus = open_corpus(missing)
    assert list(corpus) == ["storm"] and corpus.skipped == {"rows with null text skipped": 4}
    assert list(open_corpus(pd.DataFrame({"text": ["storm"]}, dtype="category"))) == ["storm"]
    errors = {
        "DataFrame.*document 1: 'id' must be text, got int": (frame, "id"),
        "more than one column 'text'": (pd.concat([frame, frame], axis=1), "text"),
        "no column 'text'": ({"train": ["storm"]}, "text"),
        "document 2: 'text' must be text, got int": ({"text": ["storm", 5]}, "text"),
        "'text' must be a sequence of texts, got str": ({"text": "storm"}, "text"),
    }
    for message, (table, column) in errors.items():
        with pytest.raises(ValueError, match=message):
            list(open_corpus(table, text_column=column))


def test_errors_do_not_quote_the_text():
    "It may be confidential, and a job's output is kept somewhere."
    nested = [{"text": {"title": "secret", "body": "secret"}}, {"text": ["secret"]}]
    rows = [(json.dumps(row).encode(), "jsonl") for row in [*nested, "secret", ["secret"]]]
    rows += [(json.dumps(nested[:1]).encode(), "json"), (b'["secret"]', "json"), (b"secret", "json")]
    for data, form in rows:
        with pytest.raises(ValueError, match="must be") as raised:
            read(data, form)
        assert "secret" not in str(raised.value)
    fails("a.txt, line 1: 'text' must be text, got dict", rows[0][0], "jsonl")
    without_header = f"1,{'a long secret ' * 3}\n2,more\n".encode()
    fails("a.txt, line 1: there is no column 'text' (set text_column), only ['1', '...']", without_header, "csv")


def test_other_separators():
    "A table of a spreadsheet may have semicolons; one of a single column, or with the right name, is as it is."
    fails("a.txt, line 1: the columns are separated by ';' instead of ','", b"id;text\n1;storm, flood\n", "csv")
    fails("the columns are separated by ',' instead of '\\t'", b"id,text\n1,storm\n", "tsv")
    assert read(b"a;b\nstorm\n", "csv", text_column="a;b") == ["storm"]


def test_json_arrays():
    "An array or consecutive objects; an array without an end is truncated."
    array = json.dumps(ROWS).encode()
    for text in (array.decode(), json.dumps(ROWS, indent=2), "\r\n".join(json.dumps(row) for row in ROWS)):
        assert read("\ufeff".encode() + text.encode(), "json") == TEXTS
    long_rows = [{"text": "x" * 5_000_000}, {"text": "short"}]
    assert read(json.dumps(long_rows).encode(), "json") == [row["text"] for row in long_rows]
    assert read(b'[{"text": "fine", "score": NaN}]', "json") == ["fine"]
    whole = json.dumps({"data": ROWS * 20_000}).encode()
    with patch.object(readers._JSON, "raw_decode", wraps=readers._JSON.raw_decode) as parse:
        fails("row 1: there is no column 'text' (set text_column), only ['data']", whole, "json")
    assert parse.call_count < 2 + math.log2(len(whole) / 2**16)  # A long object is parsed again when it has doubled
    fails("after row 3: the array has no end", array[:-1], "json")
    fails("after row 3: a ']' has no '['", array + b"]", "json")
    fails("row 3: cannot parse JSON", array[:-9], "json")
    fails("row 1: a row must be an object", b'["text", "more"]', "json")
    fails("row 1: there is no column 'text' (set text_column), only ['data']", b'{"data": []}', "json")
    fails("a.txt, line 2, byte 14 of the line: 0xe9 is not UTF-8", b'[\n{"text": "caf\xe9"}]', "json")
    fails("row 1: U+D83C is an unpaired surrogate", b'[{"text": "\\ud83c"}]', "json")
    fails("row 1: cannot parse JSON", b'[{"text": ' + b"9" * 5_000 + b"}]", "json")
    fails("row 1: cannot parse JSON", b'[{"text": ' + b"[" * 100_000, "json")


TABLE = 'id,text\r\n1,plain\r\n2,"a comma, a ""quote"", and\r\na line"\r\n\r\n3,\r\n4,"\r"\n5,🌊\0'.encode()


def test_csv():
    "Quoted cells hold anything; rows of another length and open quotes are errors."
    texts = ["plain", 'a comma, a "quote", and\na line', "🌊\0"]
    assert read("\ufeff".encode() + TABLE, "csv") == texts
    assert list(read_texts(BytesIO(TABLE), "csv", "a", ReadOptions(), Counter())) == [*texts[:2], "", "\r", texts[2]]
    assert read(b"id\ttext\n1\ta, b\n", "tsv") == ["a, b"]
    assert read(b'text\n"' + b"x" * 1_000_000 + b'"\n', "csv") == ["x" * 1_000_000]
    assert read(b"\n\ntext\nafter blank lines\n", "csv") == ["after blank lines"]
    fails("line 4: unexpected end of data", b'text\nfine\n\n"never ends\n', "csv")
    fails("a.txt, line 9: 3 cells, and the header has 2", TABLE + b"\n6,storm, flood", "csv")
    fails("a CR outside of quotes: quote the text, or convert line ends, as tr '\\r' '\\n' does", TABLE.replace(b"\n", b"\r"), "csv")
    fails("line 9: unexpected end of data: close the quote", TABLE + b'\n6,"never ends\n', "csv")
    fails("line 9: unexpected end of data", TABLE + b'\n6,"never ends\n' + b"7,later\n" * 50, "csv")  # Where it begins
    fails("line 9", TABLE + b'\n6,"ends" early\n', "csv")
    fails("line 9: a CR outside of quotes: quote the text", TABLE + b"\n6,lone\rreturn\n", "csv")
    fails("line 1: there is no column 'body'", TABLE, "csv", text_column="body")
    assert read(b"id,text\n1,caf\xe9\n\xe9,fine\n", "csv", encoding_errors="skip") == ["fine"]


def written(table: pa.Table, kind: str) -> bytes:
    "A table as Parquet, as an Arrow file, or as an Arrow stream."
    sink = BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "feather":
        feather.write_feather(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


@pytest.mark.parametrize("kind, form", [("parquet", "parquet"), ("feather", "arrow"), ("stream", "arrow")])
@pytest.mark.parametrize("column", ["text", "large", "tag", "view"])
def test_arrow_and_parquet(kind: str, form: str, column: str):
    "Strings of every Arrow type come back; other types are errors."
    texts = ["two\nlines", None, "", "flood 🌊 \0", "x" * 100_000]
    columns = {"text": texts, "large": pa.array(texts, pa.large_string()), "view": pa.array(texts, pa.string_view())}
    table = pa.table({"id": range(5), **columns, "tag": pa.array(texts).dictionary_encode()})
    table = table.drop(["view"] if kind == "parquet" else [])
    data, counts = written(table, kind), Counter()
    if column in table.column_names:
        found = list(read_texts(BytesIO(data), form, "a", ReadOptions(column), counts))
        assert found == [text for text in texts if text is not None]
        assert counts == {"rows with null text skipped": 1}
    fails("no column 'body' (set text_column), only ['id', 'text', 'large'", data, form, text_column="body")
    fails("a.txt, row 1: 'id' must be text, and its type is int64", data, form, text_column="id")
    assert read(written(pa.table({"text": pa.nulls(3)}), kind), form) == []


def test_invalid_utf8_in_arrow():
    "Arrow does not check its strings: invalid UTF-8 is an error with row and byte, replaced or skipped."
    offsets, data = pa.py_buffer(b"\0\0\0\0\0\0\0\0\x04\0\0\0\x05\0\0\0"), pa.py_buffer(b"caf\xe9!")
    invalid = written(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])}), "stream")
    fails("a.txt, row 2, byte 4 of the text: 0xe9 is not UTF-8", invalid, "arrow")
    assert read(invalid, "arrow", encoding_errors="replace") == ["caf�", "!"]
    assert read(invalid, "arrow", encoding_errors="skip") == ["!"]


def test_every_format_has_a_reader():
    "What `detect_format` can return can be read."
    for form in FORMATS:
        data = written(pa.table({"text": ["fine"]}), "parquet" if form == "parquet" else "stream")
        text = {"json": b'[{"text": "fine"}]', "jsonl": b'{"text": "fine"}', "txt": b"fine"}.get(form, b"text\nfine\n")
        assert read(data if form in ("parquet", "arrow") else text, form) == ["fine"]
