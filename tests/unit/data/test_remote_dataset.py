"A dataset in object storage is copied once per version; what cannot be opened is an error that names it."

from pathlib import Path

import fsspec
import numpy as np
import pytest
from datasets import Dataset

from langmlm import tasks
from langmlm.config import ConfigError
from langmlm.data import dataset as module
from langmlm.data.dataset import open_dataset
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig


@pytest.fixture
def storage(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Object storage in memory that holds the dataset in a bucket, and an empty cache."
    monkeypatch.setattr(module, "HF_DATASETS_CACHE", tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    memory.put(f"{data['tokenized_dataset']}/", "/bucket/dataset/", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def copies(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "langmlm").iterdir() if path.is_dir()]


def test_copied_once(storage, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local = open_dataset(data["tokenized_dataset"])
    remote = open_dataset("memory://bucket/dataset")
    assert remote.fingerprint == local.fingerprint and np.array_equal(remote.lengths, local.lengths)
    assert np.array_equal(remote.flat([0, 5]), local.flat([0, 5]))
    monkeypatch.setattr(type(storage), "get", lambda *args, **options: pytest.fail("copied again"))
    open_dataset("memory://bucket/dataset/")  # The same folder
    open_dataset("memory://bucket/dataset")


def test_new_version(storage, data, tmp_path: Path):
    open_dataset("memory://bucket/dataset")
    config = {"max_length": 16, "path_to_save_dataset": tmp_path / "new"}
    tasks.create_tokenizer(data["tokenizer"].parent / "data.txt", config, tokenizer=data["tokenizer"]).train()
    storage.rm("/bucket", recursive=True)
    storage.put(f"{tmp_path}/new/", "/bucket/dataset/", recursive=True)
    assert open_dataset("memory://bucket/dataset").max_length == 16 and len(copies(tmp_path)) == 2


def test_new_version_of_equal_size(storage, tmp_path: Path):
    "A dataset of another tool has no digests; its files have other times."
    for number in (7, 99):
        Dataset.from_dict({"input_ids": [[0, number, 2]]}).save_to_disk(tmp_path / str(number))
        storage.put(f"{tmp_path / str(number)}/", "/bucket/other/", recursive=True)
        for _ in range(2):
            assert open_dataset("memory://bucket/other")[0].tolist() == [0, number, 2]
    assert len(copies(tmp_path)) == 2


def test_server_without_sizes(storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Such as a web server: without the sizes of its files, a new version would not be noticed."
    find = type(storage).find
    no_sizes = lambda *args, **options: {name: {"size": None} for name in find(*args, **options)}  # noqa: E731
    monkeypatch.setattr(type(storage), "find", no_sizes)
    with pytest.raises(ValueError, match="does not tell the sizes of files: copy the folder"):
        open_dataset("memory://bucket/dataset")
    assert not (tmp_path / "cache").exists()


def test_interrupted_copy(storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A copy is complete or absent."
    with monkeypatch.context() as patch:
        get_file = type(storage).get_file

        def fail_at_last(self, source, target, **options):
            if source.endswith("state.json"):
                raise OSError(28, "No space left on device")
            return get_file(self, source, target, **options)

        patch.setattr(type(storage), "get_file", fail_at_last)
        with pytest.raises(OSError, match="No space left"):
            open_dataset("memory://bucket/dataset")
        assert not copies(tmp_path)
    assert len(open_dataset("memory://bucket/dataset")) and len(copies(tmp_path)) == 1


@pytest.mark.parametrize("url", ["memory://bucket/other", "nosuch://bucket/dataset"])
def test_missing(storage, url: str):
    with pytest.raises(ValueError, match=f"tokenized_dataset='{url}'"):
        open_dataset(url)


@pytest.mark.parametrize(
    ("kind", "option"), [(TrainingConfig, "output_dir"), (TokenizerConfig, "path_to_save_dataset")]
)
def test_results_are_local(kind: type, option: str):
    with pytest.raises(ConfigError, match=f"{option} must be a local path, got 's3://bucket/run'"):
        kind(**{option: "s3://bucket/run"})
