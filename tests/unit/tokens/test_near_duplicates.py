"Near-duplicates are what an exhaustive comparison finds, and they are dropped or counted in every way of tokenizing."

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from langmlm import config as config_module
from langmlm.config import ConfigError, TokenizerConfig
from langmlm.disk import read_manifest
from langmlm.text.corpus import open_corpus
from langmlm.tokens import shards as module
from langmlm.text.selection import _hash_shingles, is_duplicate, mark_near_duplicates
from langmlm.tokens.shards import join_dataset, write_dataset

pytest.importorskip("datasketch", reason="needs the package datasketch", exc_type=ImportError)


def jaccard(first: str, second: str) -> float:
    first, second = ({text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in map(normalize, (first, second)))
    return len(first & second) / len(first | second)


def normalize(text: str) -> str:
    return " ".join(text.casefold().split()).ljust(5)


@pytest.fixture(scope="module")
def texts(documents: list[str]) -> list[str]:
    "Paragraphs, some of them again with other words, all in random order."
    draw, chosen = random.Random(1), [text for text in documents[:2_000] if len(text) > 60][:150]
    changed = []
    for text in chosen:
        words = text.split()
        for _ in range(draw.choice([0, 1, 1, 2, 8])):
            words[draw.randrange(len(words))] = draw.choice(["other", "words", "here"])
        changed += [" ".join(words), text.upper()] if draw.random() < 0.5 else []
    texts = [*chosen, *changed, *chosen[:20], "a", "b", "a", "日本", "日本"]
    draw.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def marked(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    marks = mark_near_duplicates(texts, tmp_path_factory.mktemp("marks"), 0.8)
    assert len(marks) == (len(texts) + 7) // 8
    return [index for index in range(len(texts)) if is_duplicate(marks, index)]


def test_marks_are_those_of_an_exhaustive_comparison(texts: list[str], marked: list[int]):
    best = [max((jaccard(text, other) for other in texts[:index]), default=0) for index, text in enumerate(texts)]
    certain = [index for index, similarity in enumerate(best) if similarity > 0.92]
    possible = [index for index, similarity in enumerate(best) if similarity > 0.68]
    assert len(certain) > 60 and len(possible) < 0.7 * len(texts)
    assert set(certain) <= set(marked) <= set(possible)


def test_marks_depend_on_the_documents_only(texts: list[str], marked: list[int], tmp_path: Path):
    marks = mark_near_duplicates(iter(texts), tmp_path, 0.8)
    assert [index for index in range(len(texts)) if is_duplicate(marks, index)] == marked
    assert mark_near_duplicates([], tmp_path, 0.8) == b""


def test_a_higher_threshold_marks_fewer(texts: list[str], marked: list[int], tmp_path: Path):
    marks = mark_near_duplicates(texts, tmp_path, 0.97)
    stricter = {index for index in range(len(texts)) if is_duplicate(marks, index)}
    assert stricter < set(marked)


def test_long_documents_are_hashed_in_blocks(tmp_path: Path):
    draw = random.Random(0)
    long = " ".join(str(draw.random()) for _ in range(5_000))
    assert len(_hash_shingles(long)) > 2**15
    other = long[: len(long) // 2] + " ".join(str(draw.random()) for _ in range(2_500))
    marks = mark_near_duplicates([long, other, long + " end"], tmp_path, 0.8)
    assert [is_duplicate(marks, index) for index in range(3)] == [False, False, True]


def sequences(folder: Path) -> list[list[int]]:
    return [list(row) for row in load_from_disk(str(folder))["train"]["input_ids"]]


@pytest.fixture
def config(tmp_path: Path) -> TokenizerConfig:
    return TokenizerConfig(max_length=64, path_to_save_dataset=tmp_path / "dataset", near_duplicates=0.8)


def test_they_are_counted_without_being_dropped(texts: list[str], marked, tokenizer, config, tmp_path: Path):
    report = write_dataset(open_corpus(iter(texts)), tokenizer, config)
    plain = replace(config, near_duplicates=None, path_to_save_dataset=tmp_path / "plain")
    assert report["near_duplicates_found"] == len(marked) and f"near-duplicates     {len(marked)}," in repr(report)
    others = write_dataset(open_corpus(iter(texts)), tokenizer, plain)
    assert report["content"] == others["content"] and "near-duplicates" not in repr(others)


def test_they_are_dropped_with_duplicates(texts: list[str], marked, tokenizer, config, tmp_path: Path):
    report = write_dataset(open_corpus(iter(texts)), tokenizer, replace(config, drop_duplicates=True))
    kept = [text for index, text in enumerate(texts) if index not in marked]
    plain = replace(config, near_duplicates=None, path_to_save_dataset=tmp_path / "plain")
    assert report["content"] == write_dataset(open_corpus(iter(kept)), tokenizer, plain)["content"]
    assert report["statistics"]["dropped"] == len(marked) == report["near_duplicates_found"]


@pytest.mark.parametrize("dropped", [True, False])
def test_interrupted_and_shared_work_gives_the_same(texts: list[str], tokenizer, config, tmp_path: Path, monkeypatch, dropped):
    monkeypatch.setattr(module, "DOCUMENTS_PER_BATCH", 20)
    config = replace(config, drop_duplicates=dropped)
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    corpus, searches = open_corpus(tmp_path / "text.txt"), []
    expected = write_dataset(corpus, tokenizer, config, 5_000)
    parts = [replace(config, shard=(part, 2), path_to_save_dataset=tmp_path / "parts") for part in range(2)]
    for part in parts:
        write_dataset(corpus, tokenizer, part, 5_000)
    folders = [tmp_path / f"parts.part-{part}-of-2" for part in range(2)]
    assert dict(join_dataset(folders, tmp_path / "joined")) == dict(expected)
    again, write_shard = replace(config, path_to_save_dataset=tmp_path / "again"), module._write_shard

    def stop(folder: Path, last, *arguments) -> None:
        if last.begin.shard == 1 and not searches:
            searches.append("stopped")
            raise OSError("the disk is full")
        write_shard(folder, last, *arguments)

    monkeypatch.setattr(module, "_write_shard", stop)
    with pytest.raises(OSError, match="the disk is full"):
        write_dataset(corpus, tokenizer, again, 5_000)
    monkeypatch.setattr(module, "mark_near_duplicates", lambda *_, **__: pytest.fail("searched again"))
    assert dict(write_dataset(corpus, tokenizer, again, 5_000)) == dict(expected)
    assert read_manifest(tmp_path / "again")["key"] == expected["key"]


def test_the_option_is_part_of_the_key(texts: list[str], tokenizer, config):
    keys = {
        module._describe_job("source", tokenizer, replace(config, near_duplicates=value), 10)["key"]
        for value in (None, 0.7, 0.8)
    }
    assert len(keys) == 3


def test_invalid_options_and_a_missing_package(monkeypatch: pytest.MonkeyPatch):
    for value in (0, 0.4, 0.995, 1, 1.0, -1.0):  # From 0.9938 on, datasketch has too few bands
        with pytest.raises(ConfigError, match=f"near_duplicates must be None, or 0.5 to 0.99, got {value}"):
            TokenizerConfig(near_duplicates=value)
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    assert TokenizerConfig().near_duplicates is None
    with pytest.raises(ConfigError, match=r"needs the package datasketch: pip install 'langmlm\[near-duplicates\]'"):
        TokenizerConfig(near_duplicates=0.8)


def test_candidates_agree_with_an_earlier_row():
    from langmlm.text.selection import _find_candidates

    rows = np.random.default_rng(0).integers(0, 3, (5_000, 4)).astype("<u4")
    seen, expected = {}, {}
    for index, row in enumerate(map(tuple, rows.tolist())):
        if seen.setdefault(row, index) != index:
            expected[index] = seen[row]
    found = {}
    for later, first in _find_candidates(rows):
        found |= dict(zip(later.tolist(), first.tolist()))
    assert found == expected and len(expected) > 4_000
