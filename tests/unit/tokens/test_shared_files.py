"With many files, each machine reads only its own ones, and the joined dataset is that of a single machine."

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from langmlm.text.corpus import FilePart, docstrings, open_corpus
from langmlm.tokens.shards import join_dataset, write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig, load_tokenizer

CHARACTERS = 20_000  # In a shard: several per part


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Seven files with duplicate documents across them."
    folder, documents = tmp_path_factory.mktemp("texts"), list(islice(docstrings(), 1_400))
    for number in range(7):
        chosen = documents[number * 200 : (number + 1) * 200] + documents[:5]
        (folder / f"{number}.txt").write_text("\n".join(chosen), encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> TokenizerConfig:
    return TokenizerConfig(max_length=32, validation_fraction=0.1, path_to_save_dataset=tmp_path / "dataset")


def read_by_part(texts: Path, tokenizer, config: TokenizerConfig, parts: int, monkeypatch) -> list[set[str]]:
    "Make all parts; return the names of the files that each has read."
    read, original = [], FilePart._read

    def record(self, options, counts):
        read[-1].add(Path(self.name).name)
        return original(self, options, counts)

    for part in range(parts):
        corpus = open_corpus(texts)  # Looks at the beginning of every file
        read.append(set())
        with monkeypatch.context() as patch:
            patch.setattr(FilePart, "_read", record)
            patch.setattr(
                FilePart, "digest", lambda self, hash=FilePart.digest: read[-1].add(Path(self.name).name) or hash(self)
            )
            write_dataset(corpus, tokenizer, replace(config, shard=(part, parts)), CHARACTERS)
    return read


@pytest.mark.parametrize("parts", [2, 3])
def test_each_machine_reads_its_own_files(
    texts: Path, data, config: TokenizerConfig, tmp_path, monkeypatch, parts: int
):
    tokenizer = load_tokenizer(data["tokenizer"])
    single = write_dataset(
        open_corpus(texts), tokenizer, replace(config, path_to_save_dataset=tmp_path / "single"), CHARACTERS
    )
    read = read_by_part(texts, tokenizer, config, parts, monkeypatch)
    assert sorted(name for part in read for name in part) == [f"{number}.txt" for number in range(7)]
    assert all(read) and read == [set(sorted(part)) for part in read]
    joined = join_dataset(sorted(tmp_path.glob("dataset.part-*"))[::-1], tmp_path / "dataset")
    assert joined["content"] == single["content"] and joined["key"] == single["key"]
    assert {name: split["content"] for name, split in joined["splits"].items()} == {
        name: split["content"] for name, split in single["splits"].items()
    }
    assert joined["statistics"] == single["statistics"] and joined["statistics"]["duplicates"] >= 30
    before = (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns
    write_dataset(open_corpus(texts), tokenizer, config, CHARACTERS)  # Reused, since it is the dataset of this text
    assert (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["one large file", "drop_duplicates"])
def test_otherwise_every_machine_reads_everything(texts: Path, data, config, tmp_path, monkeypatch, change: str):
    "A file larger than a share cannot be shared out, and dropping duplicates needs the hashes of all documents."
    tokenizer, folder = load_tokenizer(data["tokenizer"]), tmp_path / "texts"
    folder.mkdir()
    for file in sorted(texts.iterdir())[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    if change == "drop_duplicates":
        config = replace(config, drop_duplicates=True)
    else:
        (folder / "1.txt").write_bytes(b"".join(file.read_bytes() + b"\n" for file in sorted(texts.iterdir())))
    read = read_by_part(folder, tokenizer, config, 2, monkeypatch)
    assert read == [{"0.txt", "1.txt", "2.txt"}] * 2
    single = write_dataset(
        open_corpus(folder), tokenizer, replace(config, path_to_save_dataset=tmp_path / "single"), CHARACTERS
    )
    joined = join_dataset(sorted(tmp_path.glob("dataset.part-*")), tmp_path / "dataset")
    assert joined["content"] == single["content"]


def test_parts_of_other_files(texts: Path, data, config: TokenizerConfig, tmp_path: Path):
    "A file that was changed between two parts is in the digests; one that was added is an error."
    tokenizer, folder = load_tokenizer(data["tokenizer"]), tmp_path / "texts"
    folder.mkdir()
    for file in texts.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_dataset(open_corpus(folder), tokenizer, replace(config, shard=(0, 2)), CHARACTERS)
    (folder / "9.txt").write_text("one more document")
    write_dataset(open_corpus(folder), tokenizer, replace(config, shard=(1, 2)), CHARACTERS)
    with pytest.raises(ValueError, match="differ in source"):
        join_dataset(sorted(tmp_path.glob("dataset.part-*")), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_parts_given_twice(texts: Path, data, config: TokenizerConfig, tmp_path: Path):
    "A part that is given again, or a copy of it, would repeat its documents; one read in another way is of other text."
    tokenizer, corpus = load_tokenizer(data["tokenizer"]), open_corpus(texts)
    for part in range(2):
        write_dataset(corpus, tokenizer, replace(config, shard=(part, 2)), CHARACTERS)
    first, second = sorted(tmp_path.glob("dataset.part-*"))
    copy = shutil.copytree(first, tmp_path / "copy")
    for again in (first, str(first), copy):
        with pytest.raises(ValueError, match=rf"folders: shard=\(0, 2\) is given twice, as '{first}' and '{again}'"):
            join_dataset([first, again, second], tmp_path / "dataset")
    with pytest.raises(ValueError, match="folders must be a list of folders, got 'js'"):
        join_dataset("js", tmp_path / "dataset")
    options = {"document": "blank-line", "encoding_errors": "skip"}
    write_dataset(open_corpus(texts, **options), tokenizer, replace(config, shard=(1, 2), path_to_save_dataset=copy), CHARACTERS)
    with pytest.raises(ValueError, match="differ in document, encoding_errors$"):
        join_dataset([first, tmp_path / "copy.part-1-of-2"], tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()
