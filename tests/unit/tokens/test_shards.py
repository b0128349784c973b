"Shards, resuming, parts, and the dataset folder."

import errno
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest

from langmlm.disk import is_intact, read_json, read_manifest
from langmlm.text.corpus import Corpus, TextError, open_corpus
from langmlm.tokens import shards as module
from langmlm.text.selection import hash_documents, mark_duplicates, select_validation
from langmlm.tokens.encode import read_sequences
from langmlm.tokens.processes import read_finished, unfinished_folder, work_folder
from langmlm.tokens.shards import SHARD_CHARACTERS, join_dataset, write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer

CHARACTERS = 50_000


def contents(folder: Path) -> dict[str, bytes]:
    "Read all files below a folder."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def paragraphs(documents: list[str]) -> list[str]:
    "A third of the documents, in shards of a third of their size."
    return documents[::3]


@pytest.fixture(scope="module")
def texts(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The documents in three files, with and without empty lines between them."
    folder = tmp_path_factory.mktemp("texts")
    for name, begin, end, separator in (("a", 0, 170, "\n"), ("b", 170, 3_000, "\n\n"), ("c", 3_000, None, "\n\n")):
        (folder / f"{name}.txt").write_text(separator.join(paragraphs[begin:end]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    "Short sequences and a validation split."
    target = tmp_path_factory.mktemp("dataset") / "dataset"
    return TokenizerConfig(max_length=64, validation_fraction=0.1, path_to_save_dataset=target)


@pytest.fixture(scope="module")
def written(texts: Path, tokenizer, config: TokenizerConfig) -> dict[str, bytes]:
    "The files of a dataset that one undisturbed process writes."
    write_dataset(open_corpus(texts), tokenizer, config, CHARACTERS)
    return contents(Path(config.path_to_save_dataset))


def test_batches_from_any_border(texts: Path, paragraphs: list[str]):
    "Reading from a border gives the rest of the stream, and the last batch says that it is the last."
    corpus = open_corpus(texts)
    batches = list(module._read_batches(corpus, module._Position(), 30_000))
    assert [document for batch in batches for document in batch.documents] == paragraphs
    for border in [batch.end for batch in batches if batch.end][:-1:5]:
        rest = [batch for batch in batches if batch.begin.shard >= border.shard]
        assert list(module._read_batches(corpus, border, 30_000)) == rest
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert sum((batch.skipped for batch in batches), Counter()) == corpus.skipped


def test_tokenized_batch(texts: Path, tokenizer, config: TokenizerConfig):
    "Sequences, lengths and statistics of a batch are those of its documents."
    batch = next(module._read_batches(open_corpus(texts), module._Position(), 30_000))
    tokenize = module._BatchTokenizer(tokenizer, replace(config, validation_fraction=0.2))
    made = tokenize(batch)
    encoded = tokenizer(batch.documents, add_special_tokens=False, verbose=False)["input_ids"]
    assert sum(len(made.sequences[split][2]) for split in module._SPLITS) == sum(-(-len(ids) // 62) for ids in encoded)
    _, ids, lengths = made.sequences["validation"]
    first = batch.documents[np.flatnonzero(select_validation(made.hashes, 0.2))[0]]
    assert first.startswith(tokenizer.decode(ids[1 : lengths[0] - 1]))
    used = np.zeros(len(tokenizer), bool)
    used[np.unique(np.concatenate(encoded).astype(int))] = True
    counts = made.statistics
    assert counts["used"] == module.pack_bits(used) and counts["tokens"] == sum(map(len, encoded))
    assert counts["longest_token"] == max((tokenize.vocabulary[id].decode(errors="replace") for id in np.flatnonzero(used)), key=len)
    assert counts["lengths"] == module.count_lengths(np.array(list(map(len, encoded))))
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        tokenize(module._Batch(module._Position(), 0, ["\ud83d"]))


def test_longest_token_is_that_with_most_characters(config: TokenizerConfig):
    "In a batch as over all batches, so that the report does not depend on their borders."
    tokenizer = train_tokenizer(["日本語日 sentence"] * 9, TokenizerConfig(vocab_size=400))
    tokenize = module._BatchTokenizer(tokenizer, config)
    assert tokenize(module._Batch(module._Position(), 0, ["日本語日 sentence"])).statistics["longest_token"] == " sentence"


def test_shards(texts: Path, tokenizer, config: TokenizerConfig, tmp_path: Path):
    "Processes that take turns write what one writes; missing, torn and half-written shards are made again."
    corpus, alone, shared = open_corpus(texts), tmp_path / "alone", tmp_path / "shared"
    alone.mkdir(), shared.mkdir()
    total = module._write_shards(corpus, tokenizer, alone, config, shard_characters=30_000)
    for turn in ((1, 3), (0, 3), (2, 3)):
        module._write_shards(corpus, tokenizer, shared, config, turn, 30_000)
    assert contents(shared) == contents(alone)
    for name in ("shard-00003/manifest.json", "shard-00007/train.arrow", "shard-00009/hashes"):
        (shared / name).unlink()
    (shared / "shard-00005" / "train.arrow").write_bytes(b"torn")
    assert set(range(total)) - set(module._read_shards(shared)) == {3, 5, 7, 9}
    assert module._write_shards(corpus, tokenizer, shared, config, shard_characters=30_000) == total
    assert contents(shared) == contents(alone)
    batches = [batch for batch in module._read_batches(corpus, module._Position(), 30_000) if batch.begin.shard == 2]
    sequences = [read_sequences(alone / "shard-00002" / f"{split}.arrow")[0] for split in module._SPLITS]
    restored = "".join(tokenizer.decode(ids[~np.isin(ids, [0, 2])]) for ids in sequences)
    assert len(restored) == sum(batch.characters for batch in batches)
    with pytest.raises(FileNotFoundError):
        module._write_shards(corpus, tokenizer, tmp_path / "missing", config)


def test_marked_documents_are_dropped(texts: Path, paragraphs: list[str], tokenizer, tmp_path: Path):
    "Duplicates are left out, and the record says how many."
    (tmp_path / "marks").mkdir(), (tmp_path / "shards").mkdir()
    config, marks = TokenizerConfig(max_length=64, drop_duplicates=True), mark_duplicates(paragraphs, tmp_path / "marks")
    assert sum(map(len, paragraphs)) < SHARD_CHARACTERS
    assert module._write_shards(open_corpus(texts), tokenizer, tmp_path / "shards", config, marks=marks) == 1
    counted, distinct = module._read_shards(tmp_path / "shards")[0]["statistics"], len(set(paragraphs))
    assert (counted["documents"], counted["dropped"]) == (distinct, len(paragraphs) - distinct)


def test_key(tokenizer):
    "The key depends on the text and on options that change the result, not on the number of threads."
    config = TokenizerConfig(max_length=64)
    job = module._describe_job("some text", tokenizer, config, CHARACTERS)
    assert set(job) == set(module._JOB)
    assert job == module._describe_job("some text", tokenizer, replace(config, num_workers=7), CHARACTERS)
    assert job["key"] != module._describe_job("other text", tokenizer, config, CHARACTERS)["key"]
    assert job["key"] != module._describe_job("some text", tokenizer, replace(config, stride=8), CHARACTERS)["key"]


def test_datasets_opens_the_folder(written: dict, paragraphs: list[str], tokenizer, config: TokenizerConfig):
    "`datasets` reads every document back, once and in order, with two bytes per token."
    folder = Path(config.path_to_save_dataset)
    manifest, splits = read_manifest(folder), datasets.load_from_disk(str(folder))
    assert splits["train"].features["input_ids"].feature.dtype == "uint16"
    assert {name: len(rows) for name, rows in splits.items()} == {n: s["sequences"] for n, s in manifest["splits"].items()}
    validation = select_validation(hash_documents(paragraphs), 0.1)
    for name, chosen in (("train", ~validation), ("validation", validation)):
        restored = "".join(tokenizer.decode(ids[1:-1]) for ids in splits[name]["input_ids"])
        assert restored == "".join(document for document, is_chosen in zip(paragraphs, chosen) if is_chosen)
    assert manifest["kind"] == "dataset" and is_intact(folder)
    assert sum(map(len, written.values())) / sum(split["tokens"] for split in manifest["splits"].values()) < 2.3


def test_metadata_is_that_of_datasets(written: dict, config: TokenizerConfig, tmp_path: Path):
    "The metadata files have the keys and types that `save_to_disk` of the installed `datasets` writes."
    folder = Path(config.path_to_save_dataset)
    datasets.load_from_disk(str(folder)).save_to_disk(str(tmp_path / "saved"))
    names = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.json")}
    assert names == {name for name in written if name.endswith(".json") and name != "manifest.json"}
    for name in names:
        ours, theirs = json.loads(written[name]), read_json(tmp_path / "saved" / name)
        assert ours.keys() == theirs.keys(), f"datasets has changed the format of {name}: update _write_split"
        assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in theirs.items()}
        if name.endswith("info.json"):
            assert ours == theirs


def test_finished_work_is_reused(written: dict, texts: Path, tokenizer, config: TokenizerConfig):
    "An intact dataset is not written again; a damaged one is, and so is what a kill at the very end left behind."
    folder, corpus = Path(config.path_to_save_dataset), open_corpus(texts)
    stamp, key = (folder / "manifest.json").stat().st_mtime_ns, read_manifest(folder)["key"]
    unfinished_folder(folder, key).mkdir()
    assert dict(write_dataset(corpus, tokenizer, config, CHARACTERS)) == read_manifest(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == ["dataset"]
    assert read_finished(folder, key) and not read_finished(folder, "another key")
    next((folder / "train").glob("*.arrow")).write_bytes(b"torn")
    assert read_finished(folder, key) is None
    write_dataset(corpus, tokenizer, config, CHARACTERS)
    assert contents(folder) == written


class Failing(Corpus):
    "A corpus whose last part cannot be read to its end."

    def __init__(self, corpus: Corpus, error: BaseException):
        super().__init__(corpus.parts, corpus.options)
        self.error = error

    def documents(self, part: int) -> Iterator[str]:
        yield from super().documents(part)
        if part == len(self.parts) - 1:
            raise self.error


ERRORS = [
    OSError(errno.ENOSPC, "disk full"),
    OSError(errno.EIO, "disk broken"),
    TimeoutError("server"),
    ValueError("a record of somebody else"),
    KeyboardInterrupt(),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_interruption(written: dict, texts: Path, tokenizer, config: TokenizerConfig, tmp_path: Path, error: BaseException):
    "No error but a `TextError` deletes a finished shard, and the resumed call writes the same bytes."
    corpus, config = open_corpus(texts), replace(config, path_to_save_dataset=tmp_path / "dataset", num_workers=1)
    with pytest.raises(type(error)):
        write_dataset(Failing(corpus, error), tokenizer, config, CHARACTERS)
    (unfinished,) = tmp_path.iterdir()
    kept = module._read_shards(unfinished)
    assert len(kept) > 3
    files = [record["folder"] / name for record in kept.values() for name in record["files"]]
    stamps = {file: file.stat().st_mtime_ns for file in files}
    with pytest.raises(type(error)):
        write_dataset(Failing(corpus, error), tokenizer, config, CHARACTERS)
    assert {file: file.stat().st_mtime_ns for file in files} == stamps
    write_dataset(corpus, tokenizer, config, CHARACTERS)
    assert contents(tmp_path / "dataset") == written and not unfinished.exists()


class Broken(io.RawIOBase):
    "A file on a disk that fails in the middle."

    def __init__(self, path: Path, good: int):
        self.data, self.position, self.good = path.read_bytes(), 0, good

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        if self.position >= self.good:
            raise OSError(errno.EIO, "Input/output error")
        data = self.data[self.position : min(self.position + len(buffer), self.good)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@pytest.mark.parametrize("truncated", [False, True])
def test_broken_compressed_file(paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path, truncated: bool):
    "An I/O error while a compressed file is read keeps the finished shards, and so does a file that ends early."
    file, config = tmp_path / "text.txt.gz", replace(config, path_to_save_dataset=tmp_path / "made" / "dataset", num_workers=1)
    file.write_bytes(gzip.compress("\n".join(paragraphs * 2).encode()))
    whole = file.read_bytes()

    def read_broken(self) -> io.BufferedReader:
        return io.BufferedReader(Broken(file, len(whole) * 3 // 4)) if not truncated else io.BytesIO(whole[: -len(whole) // 4])

    corpus = open_corpus(file)
    broken = patch.object(type(corpus.parts[0].file), "_open_stored", read_broken)
    with broken, pytest.raises((OSError, ValueError)):
        write_dataset(corpus, tokenizer, config, CHARACTERS)
    (unfinished,) = (tmp_path / "made").iterdir()
    assert len(module._read_shards(unfinished)) > 2


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "list": lambda content: b"[]",
    "binary": lambda content: b"\xff\xfe",
    "no files": lambda content: content.replace(b'"files"', b'"fires"'),
    "other index": lambda content: content.replace(b'"shard": 2', b'"shard": 3'),
    "outside": lambda content: content.replace(b'"hashes"', b'"../shard-00001/hashes"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_record(texts: Path, tokenizer, config: TokenizerConfig, tmp_path: Path, damage: str):
    "A damaged record costs its own shard only."
    corpus, config = open_corpus(texts), replace(config, path_to_save_dataset=tmp_path / "dataset", num_workers=1)
    with pytest.raises(OSError):
        write_dataset(Failing(corpus, OSError("disk full")), tokenizer, config, CHARACTERS)
    (unfinished,) = tmp_path.iterdir()
    before = module._read_shards(unfinished)
    record = unfinished / "shard-00002" / "manifest.json"
    assert DAMAGE[damage](record.read_bytes()) != record.read_bytes()
    record.write_bytes(DAMAGE[damage](record.read_bytes()))
    assert module._read_shards(unfinished).keys() == before.keys() - {2}
    with pytest.raises(OSError):
        write_dataset(Failing(corpus, OSError("disk full")), tokenizer, config, CHARACTERS)
    assert module._read_shards(unfinished) == before


def make_stream(paragraphs: list[str]) -> datasets.IterableDataset:
    "A stream with an identity of its own, whatever it gives."
    return datasets.IterableDataset.from_generator(lambda: ({"text": document} for document in paragraphs))


def test_longer_stream_is_not_reused(paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "Two streams with the same first 1,200 documents are two corpora; the same stream again is reused."
    config = replace(config, path_to_save_dataset=tmp_path / "dataset")
    for number in (1_200, 3_000, 1_200):
        report = write_dataset(open_corpus(make_stream(paragraphs[:number])), tokenizer, config)
        assert report["statistics"]["documents"] == number
        stamp = (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns
        assert write_dataset(open_corpus(make_stream(paragraphs[:number])), tokenizer, config) == report
        assert (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns == stamp


def test_stream_is_resumed_if_it_is_the_same(paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "An interrupted stream is resumed where its text is the same, and a resumed one equals an undisturbed one."
    config = replace(config, path_to_save_dataset=tmp_path / "alone")
    write_dataset(open_corpus(make_stream(paragraphs)), tokenizer, config, CHARACTERS)
    whole, target = contents(tmp_path / "alone"), tmp_path / "target" / "dataset"
    config = replace(config, path_to_save_dataset=target, num_workers=1)
    with pytest.raises(OSError):
        failing = Failing(open_corpus(make_stream(paragraphs)), OSError("network"))
        write_dataset(failing, tokenizer, config, CHARACTERS)
    (unfinished,) = (tmp_path / "target").iterdir()
    finished, made = len(module._read_shards(unfinished)), []
    with patch.object(module, "_write_shard", lambda *given: (made.append(given[1].begin.shard), write_shard(*given))):
        write_dataset(open_corpus(make_stream(paragraphs)), tokenizer, config, CHARACTERS)
    assert made == list(range(finished, made[-1] + 1)) and finished > 3 and contents(target) == whole


write_shard = module._write_shard


@pytest.mark.parametrize("changed", ["prefix", "dropped", "behind"])
def test_changed_stream_is_not_resumed(paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path, changed: str):
    "Finished shards are not mixed with other text, even under the same key."
    corpus, other = open_corpus(make_stream(paragraphs)), list(paragraphs)
    module._write_shards(corpus, tokenizer, tmp_path, config, shard_characters=CHARACTERS)
    records = module._read_shards(tmp_path)
    missing = 0 if changed == "behind" else len(records) // 2
    (tmp_path / f"shard-{missing:05}" / "manifest.json").unlink()
    if changed == "dropped":
        del other[3]
    else:
        other[records[1]["begin"]["total"] + 5] += "!"
    with pytest.raises(TextError, match="are not those of the finished shards|text of finished shard 1 has changed"):
        module._write_shards(open_corpus(make_stream(other)), tokenizer, tmp_path, config, shard_characters=CHARACTERS)
    module._write_shards(corpus, tokenizer, tmp_path, config, shard_characters=CHARACTERS)
    assert module._read_shards(tmp_path) == records


def test_unstable_stream(paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "A stream that gives other documents at the second reading is an error, and leaves nothing to resume."
    readings = iter(range(10**9))  # Unlike `itertools.count`, it can be pickled in Python 3.14
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": f"{text} {next(readings)}"} for text in paragraphs))
    with pytest.raises(TextError, match="other documents than when it was read before"):
        write_dataset(open_corpus(stream), tokenizer, replace(config, path_to_save_dataset=tmp_path / "dataset"), CHARACTERS)
    assert not list(tmp_path.iterdir())


def test_changed_file(texts: Path, paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "A file that grows between its fingerprint and its reading is an error."
    (tmp_path / "log.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    corpus = open_corpus(tmp_path / "log.txt")
    source = corpus.fingerprint()
    with (tmp_path / "log.txt").open("a") as log:
        log.write("\none more line")
    with pytest.raises(TextError, match="log.txt has changed since"):
        write_dataset(corpus, tokenizer, replace(config, path_to_save_dataset=tmp_path / "made" / "d"), source=source)
    assert open_corpus(tmp_path / "log.txt").fingerprint() != source


def test_invalid_text(texts: Path, paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "Invalid text and a corpus without text leave no unfinished work, and keep the older dataset."
    (tmp_path / "c.txt").write_bytes("\n".join(paragraphs).encode() + b"\ncaf\xe9")
    (tmp_path / "spaces.txt").write_text("\n \n")
    (tmp_path / "target").mkdir()
    config = replace(config, path_to_save_dataset=tmp_path / "target" / "dataset")
    write_dataset(open_corpus(texts / "a.txt"), tokenizer, config, CHARACTERS)
    before = contents(tmp_path / "target" / "dataset")
    with pytest.raises(ValueError, match="UTF-8"):
        write_dataset(open_corpus(tmp_path / "c.txt"), tokenizer, config, CHARACTERS)
    with pytest.raises(ValueError, match="no text"):
        write_dataset(open_corpus(tmp_path / "spaces.txt"), tokenizer, config)
    assert contents(tmp_path / "target" / "dataset") == before
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["dataset"]


def test_one_job_at_a_time(texts: Path, tokenizer, config: TokenizerConfig, tmp_path: Path):
    "A second process with the same job gets an error, and folders with other files are never replaced."
    corpus, config = open_corpus(texts), replace(config, path_to_save_dataset=tmp_path / "dataset")
    key = module._describe_job(corpus.fingerprint(), tokenizer, config, SHARD_CHARACTERS)["key"]
    with work_folder(tmp_path / "dataset", key, "dataset", "path_to_save_dataset"):
        with pytest.raises(RuntimeError, match="path_to_save_dataset=.* is in use by another run"):
            write_dataset(corpus, tokenizer, config)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="path_to_save_dataset=.*notes.txt"):
        write_dataset(corpus, tokenizer, config)


def test_parts(written: dict, texts: Path, tokenizer, config: TokenizerConfig, tmp_path: Path):
    "Parts are joined in any order; incomplete, foreign and damaged ones are errors that change nothing."
    corpus, config = open_corpus(texts), replace(config, path_to_save_dataset=tmp_path / "dataset")
    reports = [write_dataset(corpus, tokenizer, replace(config, shard=(part, 3)), CHARACTERS) for part in range(3)]
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"dataset.part-{part}-of-3" for part in range(3)]
    assert all(is_intact(part) for part in parts)
    joined = join_dataset(parts[::-1], tmp_path / "dataset")
    assert contents(tmp_path / "dataset") == written
    assert sum(report["statistics"]["documents"] for report in reports) == joined["statistics"]["documents"]
    other = write_dataset(corpus, tokenizer, replace(config, shard=(0, 3), stride=9, path_to_save_dataset=tmp_path / "other"))
    assert other["stride"] == 9
    for folders, message in (
        (parts[:2], r"shard=\(2, 3\) is missing"),
        ([tmp_path / "dataset"], "not a part"),
        ([], "none given"),
        ([*parts[1:], tmp_path / "other.part-0-of-3"], "differ in stride"),
    ):
        with pytest.raises(ValueError, match=message):
            join_dataset(folders, tmp_path / "dataset")
    with pytest.raises(FileExistsError, match="not part of a dataset"):
        join_dataset(parts, tmp_path)
    (parts[1] / "shard-00001" / "train.arrow").unlink()  # Its hard link in the dataset stays
    (parts[1] / "shard-00001" / "train.arrow").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match=r"shards \[1\] are missing or damaged"):
        join_dataset(parts, tmp_path / "dataset")
    assert contents(tmp_path / "dataset") == written


def test_duplicates(texts: Path, paragraphs: list[str], tokenizer, config: TokenizerConfig, tmp_path: Path):
    "Duplicates are counted, or dropped on request."
    corpus, config = open_corpus(texts), replace(config, path_to_save_dataset=tmp_path / "dataset")
    counted = write_dataset(corpus, tokenizer, config, CHARACTERS)["statistics"]
    config = replace(config, drop_duplicates=True, path_to_save_dataset=tmp_path / "distinct")
    dropped = write_dataset(corpus, tokenizer, config, CHARACTERS)["statistics"]
    assert counted["duplicates"] == dropped["dropped"] == len(paragraphs) - len(set(paragraphs))
    assert dropped["documents"] == len(set(paragraphs)) and dropped["duplicates"] == 0


def test_borders_of_a_stream_with_weights(paragraphs: list[str]):
    "The pass that finds the weights of the sources does not change the hashes at the borders."

    def open_stream() -> Corpus:
        return open_corpus(make_stream(paragraphs[:2_000]), mixing=0.3)

    batches = list(module._read_batches(open_stream(), module._Position(), 20_000))
    border = next(batch.end for batch in batches if batch.end)
    rest = [batch for batch in batches if batch.begin.shard >= border.shard]
    assert list(module._read_batches(open_stream(), border, 20_000)) == rest
