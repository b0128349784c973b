"Sequences are read alike however a dataset is chunked, padded or typed."

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets

from langmlm.data.dataset import TokenizedDataset, check_tokenizer, open_dataset, token_counts, unigram_entropy
from langmlm.tasks import create_tokenizer
from langmlm.tokens.tokenizer import load_tokenizer

LENGTHS = np.random.default_rng(0).integers(3, 20, 300)
SEQUENCES = [[0, *np.random.default_rng(row).integers(5, 400, length - 2).tolist(), 2] for row, length in enumerate(LENGTHS)]


def pad(left: int) -> dict[str, list[list[int]]]:
    "Columns of rows of 24 ids, with padding on both ends."
    rows = {"input_ids": [], "attention_mask": []}
    for ids in SEQUENCES:
        right = 24 - left - len(ids)
        rows["input_ids"].append([1] * left + ids + [1] * right)
        rows["attention_mask"].append([0] * left + [1] * len(ids) + [0] * right)
    return rows


def fixed_size(rows: Dataset) -> Dataset:
    "Lists of a fixed size, and narrow types."
    types = {"input_ids": "uint16", "attention_mask": "int8"}
    features = {name: datasets.List(datasets.Value(kind), 24) for name, kind in types.items()}
    return rows.cast(datasets.Features(features))


LAYOUTS = {
    "one chunk": lambda: Dataset.from_dict({"input_ids": SEQUENCES}),
    "many chunks": lambda: concatenate_datasets(
        [Dataset.from_dict({"input_ids": SEQUENCES[row : row + 7]}) for row in range(0, 300, 7)]
    ),
    "large lists": lambda: Dataset(pa.table({"input_ids": pa.array(SEQUENCES, pa.large_list(pa.uint32()))})),
    "padded": lambda: Dataset.from_dict(pad(0)),
    "padded on both ends": lambda: Dataset.from_dict(pad(2)),
    "fixed size": lambda: fixed_size(Dataset.from_dict(pad(1))),
    "fixed size, many chunks": lambda: fixed_size(
        concatenate_datasets([Dataset.from_dict(pad(1)).select(range(row, row + 50)) for row in range(0, 300, 50)])
    ),
    "empty rows": lambda: Dataset.from_dict(
        {
            "input_ids": [ids for row in SEQUENCES for ids in (row, [1] * 5)],
            "attention_mask": [mask for row in SEQUENCES for mask in ([1] * len(row), [0] * 5)],
        }
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_dataset(layout: str):
    dataset = TokenizedDataset(LAYOUTS[layout]())
    assert len(dataset) == 300 and dataset.tokens == LENGTHS.sum() and dataset.max_length == LENGTHS.max()
    assert dataset.lengths[:].dtype == np.int32 and dataset.lengths[:].tolist() == LENGTHS.tolist()
    assert [dataset[row].tolist() for row in range(300)] == SEQUENCES
    for rows in ([], [7], [299, 0, 150, 150], [-1, 3], np.arange(300)[::-1], np.arange(40, 44)):
        flat = dataset.flat(rows)
        assert flat.dtype == np.int64 and flat.tolist() == [id for row in rows for id in SEQUENCES[row]]
    is_long = LENGTHS > 10
    assert dataset.lengths[is_long].tolist() == LENGTHS[is_long].tolist()
    assert dataset.lengths[np.arange(300) == 7].tolist() == LENGTHS[7:8].tolist()
    blocks = list(dataset.blocks())
    assert np.concatenate([ids for ids, _ in blocks]).tolist() == [id for ids in SEQUENCES for id in ids]
    assert dataset.fingerprint == TokenizedDataset(LAYOUTS["one chunk"]()).fingerprint
    with pytest.raises(IndexError):
        dataset.flat([300])
    with pytest.raises(IndexError):
        dataset[300]


@pytest.mark.parametrize("layout", ["one chunk", "padded", "fixed size"])
def test_slices_of_tables(layout: str):
    "A slice of a table has offsets that do not begin at 0, in both columns."
    dataset = TokenizedDataset(Dataset(LAYOUTS[layout]().data.slice(11, 100)))
    assert [dataset[row].tolist() for row in range(100)] == SEQUENCES[11:111]


def test_ids_are_not_copied(tmp_path: Path):
    "Every sequence is a read-only view of the memory of Arrow, in each of several mapped files."
    rows = LAYOUTS["many chunks"]()
    rows.save_to_disk(tmp_path / "dataset", num_shards=4)
    dataset = open_dataset(tmp_path / "dataset")
    assert not any(dataset[row].flags.owndata or dataset[row].flags.writeable for row in range(0, 300, 20))
    assert [dataset[row].tolist() for row in range(300)] == SEQUENCES


def test_chunk_of_padding_only():
    empty = Dataset.from_dict({"input_ids": [[1, 1], [1, 1]], "attention_mask": [[0, 0], [0, 0]]})
    assert len(TokenizedDataset(empty)) == 0
    assert len(TokenizedDataset(concatenate_datasets([empty, Dataset.from_dict(pad(1))]))) == 300


def test_mask_with_holes():
    rows = {"input_ids": [[1, 1, 0, 9, 2], [0, 8, 8, 8, 2]], "attention_mask": [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]}
    with pytest.raises(ValueError, match="zeros between ones"):
        TokenizedDataset(Dataset.from_dict(rows))


def test_mask_of_other_lengths():
    "Would shift the tokens of all later rows."
    for ids, mask in (([[0, 5, 6, 2]] * 9, [[1, 1]] * 9), ([[0, 5], [6, 7, 2]], [[1, 1, 1], [1, 1]])):
        with pytest.raises(ValueError, match="an attention_mask is not as long as its input_ids: tokenize"):
            TokenizedDataset(Dataset.from_dict({"input_ids": ids, "attention_mask": mask}))


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([[0.5, 5.0]], "double"),
        ([["a", "b"]], "string"),
        (["a", "b"], "string"),
        ([5, 6], "int32"),
        ([[[5]], [[6]]], "list"),
        ([[], []], "null"),
        ([[0, None, 2]], "int32"),
        ([[0, 5, 2], None], "int32"),
        ([[True, False]], "bool"),
    ],
)
def test_other_types_than_lists_of_integers(tmp_path: Path, ids: list, kind: str):
    "Are an error that names the dataset, its type, and the remedy."
    Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "dataset")
    with pytest.raises(ValueError, match=rf"tokenized_dataset='.*dataset' .*no nulls in input_ids, got .*{kind}.*: tokenize the text"):
        open_dataset(tmp_path / "dataset")


@pytest.mark.parametrize("mask", [[1, 1], ["1", "1"], [["a", "b"], ["a", "b"]], [[0.0, -1e9]] * 2, [[1, None], [1, 1]]], ids=str)
def test_masks_of_other_types(tmp_path: Path, mask: list):
    "Are errors that name the column; a mask of booleans is one of integers."
    Dataset.from_dict({"input_ids": [[0, 5]] * 2, "attention_mask": mask}).save_to_disk(tmp_path / "dataset")
    with pytest.raises(ValueError, match="must have lists of integers and no nulls in attention_mask, got .*: tokenize the text"):
        open_dataset(tmp_path / "dataset")
    Dataset.from_dict({"input_ids": [[0, 5, 1]], "attention_mask": [[True, True, False]]}).save_to_disk(tmp_path / "marked")
    assert open_dataset(tmp_path / "marked")[0].tolist() == [0, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_outside_of_the_vocabulary(layout: str):
    "Are found wherever sequences are read: negative ones always, those of a tokenizer once it is known."
    rows = LAYOUTS[layout]()
    dataset = TokenizedDataset(rows)
    dataset.vocab_size = max(map(max, SEQUENCES)) + 1
    assert len(dataset.flat(range(300))) == dataset.tokens
    dataset.vocab_size -= 1
    bad = next(row for row in range(300) if max(SEQUENCES[row]) == dataset.vocab_size)
    for read in (lambda: dataset.flat([bad]), lambda: dataset.flat([3, bad]), lambda: list(dataset.blocks())):
        with pytest.raises(ValueError, match=f"tokenized_dataset is damaged: .*the id {dataset.vocab_size} is not in 0 to {dataset.vocab_size - 1}: .*langmlm info.*tokenize"):
            read()
    assert len(dataset.flat([])) == 0


def test_negative_ids():
    "Before a tokenizer is known, too."
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": [[0, 5, 2], [0, -1, 2]]}))
    with pytest.raises(ValueError, match="tokenized_dataset is damaged: the id -1 is below 0: "):
        token_counts(dataset)
    with pytest.raises(ValueError, match="the id -1"):
        check_tokenizer(dataset, Tokenizer(400))


def test_flipped_bytes(tmp_path: Path):
    "Sizes are as in the manifest, so they are found when the ids are read, under the name of the dataset."
    (tmp_path / "data.txt").write_text("\n".join(f"line {number}" for number in range(200)), encoding="utf-8")
    paths = {name: tmp_path / name for name in ("path_to_save_tokenizer", "path_to_save_dataset")}
    create_tokenizer(tmp_path / "data.txt", {"vocab_size": 270, "max_length": 50, **paths}).train()
    (file,) = (tmp_path / "path_to_save_dataset").rglob("*.arrow")
    content, ids = file.read_bytes(), open_dataset(tmp_path / "path_to_save_dataset").flat(range(200)).astype(np.uint16)
    assert content.count(ids.tobytes()) == 1
    start = content.index(ids.tobytes())
    file.write_bytes(content[:start + 100] + b"\xff" * 8 + content[start + 108 :])
    dataset, tokenizer = open_dataset(tmp_path / "path_to_save_dataset"), load_tokenizer(tmp_path / "path_to_save_tokenizer")
    check_tokenizer(dataset, tokenizer)
    with pytest.raises(ValueError, match="tokenized_dataset='.*path_to_save_dataset' is damaged: .*the id 65535"):
        dataset.flat(range(200))


def test_a_selection_of_rows():
    "Its order is kept apart from its data, which would be read in the old order."
    rows = LAYOUTS["one chunk"]().select([7, 3])
    with pytest.raises(ValueError, match="my_rows is a selection of rows: pass rows.flatten_indices()"):
        TokenizedDataset(rows, name="my_rows")
    assert TokenizedDataset(rows.flatten_indices())[1].tolist() == SEQUENCES[3]


def test_open_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A plain dataset is the training split; what is missing is named."
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = LAYOUTS["one chunk"]()
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict(train=rows.select(range(9)), validation=rows.select([7, 3])).save_to_disk(tmp_path / "splits")
    DatasetDict(test=rows).save_to_disk(tmp_path / "test")
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "text")
    Dataset.from_dict({"input_ids": [[]]}, features=rows.features).save_to_disk(tmp_path / "empty")
    no_rows = rows.select([])
    no_rows.save_to_disk(tmp_path / "no rows")
    DatasetDict(train=no_rows, validation=rows).save_to_disk(tmp_path / "no training")
    DatasetDict(train=rows, validation=no_rows).save_to_disk(tmp_path / "no validation")
    assert len(open_dataset(tmp_path / "plain")) == len(open_dataset(tmp_path / "no validation")) == 300
    assert open_dataset("~/splits", "validation")[0].tolist() == SEQUENCES[7]
    for folder, split, message in (
        ("nowhere", "train", "is not a dataset folder"),
        ("test", "train", "has no split 'train', only"),
        ("plain", "validation", "tokenize with validation_fraction"),
        ("text", "train", "has no column 'input_ids', only"),
        ("empty", "train", "has no sequences"),
        ("no rows", "train", "has no sequences in its split 'train'"),
        ("no training", "train", "has no sequences in its split 'train'"),
        ("no validation", "validation", "has no sequences in its split 'validation'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path / folder, split)


def test_splits_share_a_max_length(tmp_path: Path):
    "The validation split has the `max_length` it was tokenized with, as the training split, and its own fingerprint."
    (tmp_path / "data.txt").write_text("\n".join(f"line {number}" for number in range(200)), encoding="utf-8")
    paths = {name: tmp_path / name for name in ("path_to_save_tokenizer", "path_to_save_dataset")}
    config = {"vocab_size": 270, "max_length": 50, "validation_fraction": 0.2, **paths}
    create_tokenizer(tmp_path / "data.txt", config).train()
    train, validation = (open_dataset(tmp_path / "path_to_save_dataset", split) for split in ("train", "validation"))
    assert train.max_length == validation.max_length == 50 > validation.lengths.max()
    for split in (train, validation):
        assert split.fingerprint == TokenizedDataset(Dataset.from_dict({"input_ids": list(split)})).fingerprint
        assert split.manifest["sequences"] == len(split)
    tokenizer = load_tokenizer(tmp_path / "path_to_save_tokenizer")
    check_tokenizer(validation, tokenizer)
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        check_tokenizer(validation, tokenizer)


class Tokenizer:
    "As much of a tokenizer as the check of a foreign dataset uses."

    pad_token_id, all_special_ids = 1, [0, 1, 2, 3, 4]

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_check_tokenizer():
    "In a dataset without a manifest, ids outside the vocabulary and unmarked padding are found."
    check_tokenizer(TokenizedDataset(LAYOUTS["padded"]()), Tokenizer(400))
    with pytest.raises(ValueError, match="has only 300 tokens"):
        check_tokenizer(TokenizedDataset(LAYOUTS["padded"]()), Tokenizer(300))
    largest = max(map(max, SEQUENCES))
    check_tokenizer(TokenizedDataset(LAYOUTS["padded"]()), Tokenizer(largest + 1))
    with pytest.raises(ValueError, match=f"contains the id {largest}, but the tokenizer has only {largest} tokens"):
        check_tokenizer(TokenizedDataset(LAYOUTS["padded"]()), Tokenizer(largest))
    unmarked = Dataset.from_dict({"input_ids": pad(0)["input_ids"]})
    with pytest.raises(ValueError, match="is padded but has no column 'attention_mask'"):
        check_tokenizer(TokenizedDataset(unmarked), Tokenizer(400))


def test_nothing_to_predict():
    "A dataset of special tokens only is an error before the run."
    for ids in ([[0, 2]] * 1_500, [[0, 4, 2]]):
        with pytest.raises(ValueError, match="my_dataset has only special tokens, so there is nothing to predict: tokenize"):
            check_tokenizer(TokenizedDataset(Dataset.from_dict({"input_ids": ids}), name="my_dataset"), Tokenizer(400))
    for ids in ([[0, 2]] * 1_500 + [[0, 5, 2]], [[0, 5, 2]] + [[0, 2]] * 1_500):
        check_tokenizer(TokenizedDataset(Dataset.from_dict({"input_ids": ids})), Tokenizer(400))


def test_unigram_entropy():
    "Of equal frequencies it is the logarithm of their number; special tokens do not count."
    even = TokenizedDataset(Dataset.from_dict({"input_ids": [[0, 5, 6, 7, 8, 2]] * 3}))
    assert unigram_entropy(even, [0, 2]) == pytest.approx(np.log(4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_counts(layout: str, monkeypatch: pytest.MonkeyPatch):
    "Every token is counted, in whatever order larger ids come, and the sequences are read once."
    dataset = TokenizedDataset(LAYOUTS[layout]())
    ids = [id for sequence in SEQUENCES for id in sequence]
    assert token_counts(dataset).tolist() == np.bincount(ids).tolist()
    monkeypatch.setattr(TokenizedDataset, "blocks", None)
    assert token_counts(dataset).sum() == dataset.tokens
