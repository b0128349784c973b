"Tokenizing that is killed, resumed or shared writes the same bytes as one undisturbed process."

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

from langmlm.data.dataset import open_dataset
from langmlm.text.corpus import open_corpus
from langmlm.tokens.shards import join_dataset, write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig

SHARD_CHARACTERS = 15_000
KILLS = 4  # `benchmarks/scale.py kills` does more
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
WORDS = st.lists(st.sampled_from(["Yes.", "no", "3.14", "日本。", "naïve", "🙂🙂", "\t", "long" * 9]), max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Three files of 200 kB, with duplicate documents and empty lines."
    folder = tmp_path_factory.mktemp("text")
    for name in "abc":
        lines = [f"{name} {number % 300} " + "some words to split, and a sentence. " * (number % 13) for number in range(800)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict:
    "Every option that affects writing."
    target = tmp_path_factory.mktemp("dataset") / "dataset"
    how = {"max_length": 64, "split_on": "sentence", "stride": 4, "validation_fraction": 0.1}
    return how | {"path_to_save_dataset": str(target)}


@pytest.fixture(scope="module")
def undisturbed(text: Path, options: dict, data: dict[str, Path]) -> dict[str, bytes]:
    "The files that one undisturbed process writes."
    tokenizer, config = AutoTokenizer.from_pretrained(data["tokenizer"]), TokenizerConfig(**options)
    write_dataset(open_corpus(text), tokenizer, config, SHARD_CHARACTERS)
    return contents(Path(options["path_to_save_dataset"]))


def test_killed_runs_resume_to_identical_bytes(text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path):
    "Killed at random moments and resumed each time, a job writes the same bytes and leaves nothing else behind."
    target = tmp_path / "dataset"
    job = str(text), str(data["tokenizer"]), SHARD_CHARACTERS, options | {"path_to_save_dataset": str(target)}
    assert kill_often(job, target, KILLS, seed=0)["equal"]
    assert contents(target) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_two_processes_equal_one(text: Path, options: dict, data: dict, tmp_path: Path):
    "Two processes of a launcher share the shards, one finds the duplicates, and the dataset equals that of one process."
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
        [*launcher, tmp_path / "job.py", job], capture_output=True, text=True, timeout=1_500, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert contents(tmp_path / "dataset") == contents(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


def test_joined_parts_equal_one_process(text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path):
    "Three parts made separately and joined in any order equal the dataset of one process."
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
def test_documents_round_trip(
    data: dict, tmp_path: Path, documents: list[str], split_on: str, max_length: int, stride: int, shard_characters: int
):
    "Every document is in the dataset exactly once and in order, however it is split; overlaps are `stride` tokens long."
    documents = [document for document in documents if document.strip()]
    if not documents:
        return
    stride, tokenizer = min(stride, max(0, max_length - 3)), AutoTokenizer.from_pretrained(data["tokenizer"])
    target = tmp_path / "dataset"
    config = TokenizerConfig(max_length=max_length, split_on=split_on, stride=stride, path_to_save_dataset=target)
    write_dataset(open_corpus(iter(documents)), tokenizer, config, shard_characters)
    rows = iter(dataset := open_dataset(target))
    assert dataset.lengths.max() <= max_length
    for document in documents:
        encoded = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        restored = next(rows)[1:-1].tolist()
        while len(restored) < len(encoded):
            piece = next(rows)[1:-1].tolist()
            assert piece[:stride] == restored[len(restored) - stride :]
            restored += piece[stride:]
        assert restored == encoded and tokenizer.decode(restored) == document
    assert next(rows, None) is None
