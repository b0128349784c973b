"Hashes of documents, the validation split, and duplicates."

import errno
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from langmlm.text.corpus import docstrings
from langmlm.text.selection import (
    HASH,
    find_duplicates,
    hash_documents,
    is_duplicate,
    mark_duplicates,
    select_validation,
    write_hashes,
)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    "The docstrings of the standard library."
    return list(docstrings())


@pytest.fixture(scope="module")
def expected(documents: list[str]) -> list[int]:
    "Indices of documents that occurred before, found with a set."
    seen: set[str] = set()
    return [index for index, document in enumerate(documents) if document in seen or seen.add(document)]


def test_hash_documents(documents: list[str]):
    "A hash depends on the document alone, its index on the position."
    hashes = hash_documents(documents)
    assert hashes.dtype == HASH and HASH.itemsize == 24
    assert np.array_equal(hashes[100:105], hash_documents(documents[100:105], first=100))
    assert len(np.unique(hashes["high"])) == len(set(documents))
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        hash_documents(["half a \ud83d pair"])


def test_select_validation(documents: list[str]):
    "The share is about right, order does not matter, and a larger fraction keeps the documents of a smaller one."
    hashes = hash_documents(documents)
    chosen = select_validation(hashes, 0.1)
    assert abs(chosen.mean() - 0.1) < 0.02 and not select_validation(hashes, 0.0).any()
    assert (select_validation(hashes, 0.2) | ~chosen).all()
    assert np.array_equal(select_validation(hash_documents(documents[::-1]), 0.1), chosen[::-1])
    with pytest.raises(ValueError, match="validation_fraction must be at least 0 and below 1, got 1.0"):
        select_validation(hashes, 1.0)


def test_find_duplicates(documents: list[str], expected: list[int], tmp_path: Path):
    "Duplicates within and across files are those that a set finds, in any number of ranges."
    runs, files = [(documents[:9_000], 0), (documents[9_000:], 9_000)], [tmp_path / "0", tmp_path / "1"]
    within = [write_hashes(file, hash_documents(*run)) for file, run in zip(files, runs)]
    for hashes_per_range in (1_000, 10**6):
        across = list(find_duplicates(files, hashes_per_range))
        assert np.sort(np.concatenate([*within, *across])).tolist() == expected
    assert not list(find_duplicates([]))


def test_mark_duplicates(documents: list[str], expected: list[int], tmp_path: Path):
    "One bit per document marks the duplicates."
    marks = mark_duplicates(documents, tmp_path, hashes_per_file=5_000)
    assert [index for index in range(len(documents)) if is_duplicate(marks, index)] == expected
    assert len(marks) == (len(documents) + 7) // 8
    with pytest.raises(IndexError):
        is_duplicate(marks, len(documents) + 8)


def test_documents_are_not_kept(tmp_path: Path):
    "Documents are hashed as they arrive: the memory needed does not depend on their length."
    texts = (f"{number % 3_000:06}" + "x" * 10_000 for number in range(4_000))
    tracemalloc.start()
    try:
        marks = mark_duplicates(texts, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6  # The documents have 40 MB
    assert [index for index in range(4_000) if is_duplicate(marks, index)] == list(range(3_000, 4_000))


@pytest.mark.parametrize("hashes_per_file", [1, 3, 8])
def test_files_of_any_size(hashes_per_file: int, tmp_path: Path):
    "A file may end at any document, also in the middle of a byte of the marks."
    texts = list("abcabcdaefga")
    marks = mark_duplicates(iter(texts), tmp_path, hashes_per_file)
    assert [is_duplicate(marks, index) for index in range(12)] == [text in texts[:at] for at, text in enumerate(texts)]
    assert mark_duplicates(iter([]), tmp_path) == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists on Linux only")
def test_hashes_on_a_full_disk(documents: list[str]):
    "The error is that of the disk; `ndarray.tofile` would only count items."
    with pytest.raises(OSError) as caught:
        write_hashes(Path("/dev/full"), hash_documents(documents))
    assert caught.value.errno == errno.ENOSPC
