"Tokenizing that is killed, shared, or fed with anything ends with the dataset that one undisturbed process makes."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import contents, kill_often
from transformers import AutoTokenizer

from langmlm.text.corpus import open_corpus
from langmlm.data.dataset import open_dataset
from langmlm.tokens.shards import join_dataset
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.tokens.shards import write_dataset

SHARD_CHARACTERS = 50_000
KILLS = 4  # `benchmarks/scale.py kills` does more
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
WORDS = st.lists(st.sampled_from(["Yes.", "no", "3.14", "日本。", "naïve", "🙂🙂", "\t", "long" * 9]), max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Three files of some megabytes, with copies and blank lines."
    folder = tmp_path_factory.mktemp("text")
    for name in "abc":
        lines = [f"{name} {number % 300} " + "some words to cut, and a sentence. " * (number % 13) for number in range(2_500)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict:
    "Every option that has a part in writing."
    target = tmp_path_factory.mktemp("dataset") / "dataset"
    how = {"max_length": 64, "split_on": "sentence", "stride": 4, "validation_fraction": 0.1}
    return how | {"path_to_save_dataset": str(target)}


@pytest.fixture(scope="module")
def undisturbed(text: Path, options: dict, data: dict[str, Path]) -> dict[str, bytes]:
    "What one process makes that nothing disturbs."
    tokenizer, config = AutoTokenizer.from_pretrained(data["tokenizer"]), TokenizerConfig(**options)
    write_dataset(open_corpus(text), tokenizer, config, SHARD_CHARACTERS)
    return contents(Path(options["path_to_save_dataset"]))


def test_kills_change_nothing(text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path):
    "Killed at random moments and resumed each time: every byte is as it would have been, and nothing else is left."
    target = tmp_path / "dataset"
    job = str(text), str(data["tokenizer"]), SHARD_CHARACTERS, options | {"path_to_save_dataset": str(target)}
    assert kill_often(job, target, KILLS, seed=0)["equal"]
    assert contents(target) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_two_processes_are_one(text: Path, options: dict, data: dict, tmp_path: Path):
    "Under a launcher two processes share the shards, one looks for copies, and one dataset comes out."
    options = options | {"drop_duplicates": True, "path_to_save_dataset": str(tmp_path / "alone")}
    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer"])
    write_dataset(open_corpus(text), tokenizer, TokenizerConfig(**options), SHARD_CHARACTERS)
    config = options | {"path_to_save_dataset": str(tmp_path / "dataset")}
    job = json.dumps([str(text), str(data["tokenizer"]), SHARD_CHARACTERS, config])
    (tmp_path / "job.py").write_text("import json, sys; from kills import make_dataset; make_dataset(*json.loads(sys.argv[1]))")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    finished = subprocess.run(
        [*launcher, tmp_path / "job.py", job], capture_output=True, text=True, timeout=120, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert contents(tmp_path / "dataset") == contents(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


def test_parts_are_one(text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path):
    "Three machines make a part each; joined, in any order, they are what one makes."
    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer"])
    for part in range(3):
        config = TokenizerConfig(**options | {"path_to_save_dataset": tmp_path / "dataset", "shard": (part, 3)})
        write_dataset(open_corpus(text), tokenizer, config, SHARD_CHARACTERS)
    join_dataset(sorted(tmp_path.glob("dataset.part-*"), reverse=True), tmp_path / "dataset")
    assert contents(tmp_path / "dataset") == undisturbed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(TEXT | WORDS, min_size=1, max_size=20),
    split_on=st.sampled_from(["token", "word", "sentence"]),
    max_length=st.integers(3, 40),
    stride=st.integers(0, 36),
    shard_characters=st.integers(1, 300),
)
def test_documents_come_back(
    data: dict, tmp_path: Path, documents: list[str], split_on: str, max_length: int, stride: int, shard_characters: int
):
    "Every document is in the dataset exactly once and in order, whatever the cut; overlaps are as long as `stride` says."
    documents = [document for document in documents if document.strip()]
    if not documents:
        return
    stride, tokenizer = min(stride, max(0, max_length - 3)), AutoTokenizer.from_pretrained(data["tokenizer"])
    target = tmp_path / "dataset"
    config = TokenizerConfig(max_length=max_length, split_on=split_on, stride=stride, path_to_save_dataset=target)
    write_dataset(open_corpus(iter(documents)), tokenizer, config, shard_characters)
    rows = iter(corpus := open_dataset(target))
    assert corpus.lengths.max() <= max_length
    for document in documents:
        encoded = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        restored = next(rows)[1:-1].tolist()
        while len(restored) < len(encoded):
            piece = next(rows)[1:-1].tolist()
            assert piece[:stride] == restored[len(restored) - stride :]
            restored += piece[stride:]
        assert restored == encoded and tokenizer.decode(restored) == document
    assert next(rows, None) is None
