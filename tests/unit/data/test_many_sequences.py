"Datasets of many sequences and of many files: lengths are read on demand, and memory does not grow with them."

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk

from langmlm.data.batching import BatchPlan, make_flat_batch
from langmlm.data.dataset import TokenizedDataset, open_dataset
from langmlm.data.masking import fixed_sizes
from langmlm.disk import read_manifest
from langmlm.text.corpus import docstrings, open_corpus
from langmlm.tokens import shards
from langmlm.tokens.shards import write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer

SEQUENCES = 1_200_000  # More than a chunk of a plan, so that it has two
OPTIONS = {"seed": 1, "token_budget": 8_192, "sequences_per_batch": None, "batches_per_step": 2, "num_train_epochs": 3}
MANIFEST = {"max_length": 9}


def make_lengths(sequences: int) -> np.ndarray:
    "Lengths of 3 to 9 tokens."
    return np.random.default_rng(0).integers(3, 10, sequences).astype(np.int32)


def make_rows(lengths: np.ndarray, chunks: int) -> Dataset:
    "Sequences of given lengths in several chunks; every id is an index of a token in its chunk, up to 65,535."
    columns = []
    for part in np.array_split(lengths, chunks):
        offsets = np.concatenate([[0], np.cumsum(part)]).astype(np.int32)
        columns.append(pa.ListArray.from_arrays(offsets, np.arange(offsets[-1]).astype(np.uint16)))
    return Dataset(pa.table({"input_ids": pa.chunked_array(columns)}))


@pytest.mark.parametrize("chunks", [1, 7, 1_000])
def test_lengths_are_those_of_an_array(chunks: int):
    "Whatever selects them, in each of the ways of looking them up: few rows, many rows, a single chunk."
    expected = make_lengths(50_000)
    lengths = TokenizedDataset(make_rows(expected, chunks)).lengths
    rng = np.random.default_rng(1)
    assert len(lengths) == len(expected) and lengths.max() == 9 and np.array_equal(lengths, expected)
    assert lengths[:].dtype == lengths[[3, 1]].dtype == np.asarray(lengths).dtype == np.int32
    for size in (1, 30, 3_000, 120_000):
        rows = rng.integers(-len(expected), len(expected), size)
        assert np.array_equal(lengths[rows], expected[rows])
    for rows in (slice(7, 2_000), slice(None, None, 3), slice(5, 5), slice(-4, None)):
        assert np.array_equal(lengths[rows], expected[rows])
    assert lengths[49_999] == lengths[-1] == expected[-1] and lengths[np.zeros(0, np.int64)].tolist() == []
    for rows in (50_000, [50_000], [-50_001], np.append(np.arange(49_999), 50_000)):
        with pytest.raises(IndexError, match="out of bounds"):
            lengths[rows]


@pytest.mark.parametrize("chunks", [1, 7, 1_000])
def test_batches_are_those_of_an_array_of_lengths(chunks: int):
    "A plan of lengths that are looked up has the steps of a plan of an array, and batches have the right ids."
    expected = make_lengths(SEQUENCES)
    dataset = TokenizedDataset(make_rows(expected, chunks), MANIFEST)
    ours, theirs = (BatchPlan(lengths, **OPTIONS) for lengths in (dataset.lengths, expected))
    assert ours.total_steps == theirs.total_steps
    for step in (0, 1, ours.steps_per_epoch // 2, ours.total_steps - 1):
        (epoch, rows), (other, others) = ours.batches(step), theirs.batches(step)
        assert epoch == other and len(rows) == len(others) and all(map(np.array_equal, rows, others))
    batch = make_flat_batch(dataset, rows[0], pad_token_id=1)
    assert np.array_equal(batch.rows, rows[0][np.argsort(expected[rows[0]], kind="stable")])
    sizes = [len(part) for part in np.array_split(expected, chunks)]
    first_rows = np.cumsum([0, *sizes])
    starts = np.concatenate([np.cumsum(part) - part for part in np.split(expected, first_rows[1:-1])])
    ids = np.concatenate([np.arange(starts[row], starts[row] + expected[row]) for row in batch.rows])
    assert np.array_equal(batch.input_ids, ids % 2**16)


def test_memory_does_not_grow_with_the_sequences():
    "Opening a dataset of one chunk allocates nothing per sequence; sums come from the ends of the chunk."
    lengths = make_lengths(SEQUENCES)
    rows, tokens = make_rows(lengths, 1), lengths.sum()
    tracemalloc.start()
    dataset = TokenizedDataset(rows, MANIFEST)
    assert dataset.tokens == tokens
    dataset.lengths[[0, SEQUENCES // 2]], dataset.flat([1, SEQUENCES - 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_sizes_of_many_sequences_come_from_a_sample():
    "The sizes of a large dataset are those of all its sequences, up to rounding."
    lengths = make_lengths(SEQUENCES)
    sampled = fixed_sizes(TokenizedDataset(make_rows(lengths, 5), MANIFEST).lengths, 16_384, 0.15)
    assert sampled == fixed_sizes(np.tile(lengths[: 2**19], 2), 16_384, 0.15)


@pytest.mark.parametrize("parts", [1, 3])
def test_files_of_many_shards_are_joined(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Above a number of shards, several share a file; sequences, hashes and counts stay what they were."
    documents, options = list(islice(docstrings(), 3_000)), {"max_length": 32, "validation_fraction": 0.1}
    tokenizer = train_tokenizer(documents[:500], TokenizerConfig(vocab_size=400))

    def write(name: str) -> tuple[dict, dict[str, list[Path]]]:
        config = TokenizerConfig(**options, path_to_save_dataset=tmp_path / name)
        write_dataset(open_corpus(iter(documents)), tokenizer, config, shard_characters=30_000)
        files = {split: sorted((tmp_path / name / split).glob("*.arrow")) for split in ("train", "validation")}
        return read_manifest(tmp_path / name), files

    plain, linked = write("plain")
    monkeypatch.setattr(shards, "_MANY_FILES", 5)
    monkeypatch.setattr(shards, "_JOINED_BYTES", 1 + sum(file.stat().st_size for file in linked["train"]) // parts)
    joined, files = write("joined")
    for split in ("train", "validation"):
        assert joined["splits"][split] == plain["splits"][split]
        assert len(linked[split]) > 5 and len(files[split]) == (parts if split == "train" else 1)
        assert sum(file.stat().st_size for file in files[split]) < sum(file.stat().st_size for file in linked[split])
        ours, theirs = (load_from_disk(tmp_path / name)[split]["input_ids"][:] for name in ("joined", "plain"))
        assert ours == theirs
        assert open_dataset(tmp_path / "joined", split).fingerprint == plain["splits"][split]["content"]
        assert len(load_from_disk(tmp_path / "joined")[split].data.column("input_ids").chunks) == len(files[split])
    assert TokenizedDataset(load_from_disk(tmp_path / "joined")["train"]).fingerprint == plain["content"]
