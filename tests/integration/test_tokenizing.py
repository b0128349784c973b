"Tokenizing that is killed, resumed or shared writes the same bytes as one undisturbed process."

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import failing_process
import pytest
from datasets import load_from_disk
from conftest import HANG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import contents, kill_often
from forks import fork_server, forked_python
from transformers import AutoTokenizer

from langmlm.data.dataset import open_dataset
from langmlm.text.corpus import open_corpus
from langmlm.tokens.shards import join_dataset, write_dataset
from langmlm.tokens.tokenizer import TokenizerConfig

SHARD_CHARACTERS = 15_000
KILLS = 4  # `benchmarks/scale.py kills` does more
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
WORDS = st.lists(st.sampled_from(["Yes.", "no", "3.14", "日本。", "naïve", "🙂🙂", "\t", "long" * 9]), max_size=40).map(
    " ".join
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Three files of 200 kB, with duplicate documents and empty lines."
    folder = tmp_path_factory.mktemp("text")
    for name in "abc":
        lines = [
            f"{name} {number % 300} " + "some words to split, and a sentence. " * (number % 13) for number in range(800)
        ]
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


def test_killed_runs_resume_to_identical_bytes(
    text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path
):
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
    (tmp_path / "job.py").write_text(
        "import json, sys; from kills import make_dataset; make_dataset(*json.loads(sys.argv[1]))"
    )
    launcher = [forked_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    finished = subprocess.run(
        [*launcher, tmp_path / "job.py", job], capture_output=True, text=True, timeout=1_500, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert contents(tmp_path / "dataset") == contents(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


def test_joined_parts_equal_one_process(text: Path, options: dict, data: dict, tmp_path: Path):
    "Three parts made separately and joined in any order equal the dataset of one process, byte for byte."
    tokenizer, file = AutoTokenizer.from_pretrained(data["tokenizer"]), text / "a.txt"
    alone = TokenizerConfig(**options | {"path_to_save_dataset": tmp_path / "alone"})
    write_dataset(open_corpus(file), tokenizer, alone, SHARD_CHARACTERS)
    for part in range(3):
        config = TokenizerConfig(**options | {"path_to_save_dataset": tmp_path / "dataset", "shard": (part, 3)})
        write_dataset(open_corpus(file), tokenizer, config, SHARD_CHARACTERS)
    join_dataset(sorted(tmp_path.glob("dataset.part-*"), reverse=True), tmp_path / "dataset")
    assert contents(tmp_path / "dataset") == contents(tmp_path / "alone")


def test_joined_parts_of_several_files_have_the_same_sequences(
    text: Path, options: dict, undisturbed: dict, data: dict, tmp_path: Path
):
    "Each part reads its own files, so that shards end elsewhere; all else is equal: sequences, order, key, report."
    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer"])
    for part in range(3):
        config = TokenizerConfig(**options | {"path_to_save_dataset": tmp_path / "dataset", "shard": (part, 3)})
        write_dataset(open_corpus(text), tokenizer, config, SHARD_CHARACTERS)
    join_dataset(sorted(tmp_path.glob("dataset.part-*"), reverse=True), tmp_path / "dataset")
    joined, alone = load_from_disk(tmp_path / "dataset"), load_from_disk(options["path_to_save_dataset"])
    assert [joined[name]["input_ids"][:] for name in alone] == [alone[name]["input_ids"][:] for name in alone]
    manifests = [json.loads(found["manifest.json"]) for found in (contents(tmp_path / "dataset"), undisturbed)]
    for name in ("key", "content", "statistics", "sequences", "tokens"):
        first, second = (manifest.get(name) for manifest in manifests)
        assert first == second is not None, name


def start(job: dict, folder: Path) -> subprocess.Popen:
    "Start one process."
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [forked_python(), Path(__file__).with_name("failing_process.py"), json.dumps(job)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_one(job: dict, folder: Path, rank: int, port: int, output: Path) -> None:
    "One process of a pair with a launcher's environment, a fork of a process that has imported everything."
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    failing_process.main(job)


def wait_for_end(process: multiprocessing.Process) -> float:
    "Wait for the end of a process, and return the time; kill it if it hangs."
    process.join(HANG)
    if process.is_alive():
        process.kill()
        process.join()
    return time.monotonic()


def run_pair(job: dict, folder: Path) -> list[tuple[int, str, float]]:
    "Run two processes of a launch without its agent; return their exit codes, outputs, and when each ended."
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with TemporaryDirectory() as logs:
        names = [Path(logs) / str(rank) for rank in range(2)]
        pair = [fork_server().Process(target=run_one, args=(job, folder, rank, port, names[rank])) for rank in range(2)]
        for process in pair:
            process.start()
        with ThreadPoolExecutor(2) as pool:
            ends = list(pool.map(wait_for_end, pair))
        outputs = [name.read_text(encoding="utf-8") for name in names]
    return [(process.exitcode, output, end) for process, output, end in zip(pair, outputs, ends)]


@pytest.fixture
def pair_job(text: Path, tmp_path: Path) -> dict:
    "A job for two processes: train a tokenizer, find duplicates, make shards, join them."
    names = {"path_to_save_tokenizer": str(tmp_path / "tokenizer"), "path_to_save_dataset": str(tmp_path / "dataset")}
    config = {"vocab_size": 500, "max_length": 64, "drop_duplicates": True, **names}
    return {"data": str(text / "a.txt"), "config": config, "tokenizer": None, "fail": None, "rank": 1, "kill": False}


@pytest.mark.parametrize(
    "point, rank", [("training", 0), ("duplicates", 0), ("shard", 1), ("saving", 0), ("naming", 0)]
)
def test_failure_ends_all_processes(pair_job: dict, tmp_path: Path, point: str, rank: int):
    "Wherever one process fails, the other one ends within seconds, with its message; the next launch completes the work."
    results = run_pair(pair_job | {"fail": point, "rank": rank}, tmp_path)
    assert all(code != 0 for code, _, _ in results)
    assert "No space left, says" in results[rank][1]
    assert f"process {rank} of 2 failed: OSError: [Errno 28] No space left, says" in results[1 - rank][1]
    assert abs(results[0][2] - results[1][2]) < 20
    assert [code for code, _, _ in run_pair(pair_job, tmp_path)] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "tokenizer"]


def test_killed_process_is_noticed(pair_job: dict, tmp_path: Path):
    "A process that is killed leaves no message: after the time-out, the other one says so and names the constant."
    results = run_pair(pair_job | {"fail": "shard", "rank": 1, "kill": True, "timeout": 3}, tmp_path)
    assert results[1][0] == -signal.SIGKILL and results[0][0] == 1
    assert (
        "process 1 of 2 has sent no heartbeat for 3 seconds (langmlm.tokens.processes.PROCESS_TIMEOUT)"
        in results[0][1]
    )
    assert results[0][2] - results[1][2] < 60
    assert [code for code, _, _ in run_pair(pair_job, tmp_path)] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "tokenizer"]


def test_failure_under_torchrun(pair_job: dict, tmp_path: Path):
    "Under `torchrun`, whose agent ends the other processes, the launch fails with the message."
    launcher = [forked_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    job = json.dumps(pair_job | {"fail": "shard", "rank": 1})
    command = [*launcher, Path(__file__).with_name("failing_process.py"), job]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1_500, env=environment, cwd=tmp_path)
    assert finished.returncode != 0 and "No space left, says _write_shard" in finished.stderr


def test_two_processes_without_a_launcher(pair_job: dict, tmp_path: Path):
    "Two processes that know nothing of each other: one does the work, and the other one reuses it or is told to wait."
    pair = [start(pair_job, tmp_path), start(pair_job, tmp_path)]
    outputs = [process.communicate()[0] for process in pair]
    codes = [process.returncode for process in pair]
    assert 0 in codes
    assert codes == [0, 0] or "is in use by another run" in outputs[codes.index(1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "tokenizer"]


def test_killed_iterator_leaves_no_temporary_file(data: dict, tmp_path: Path):
    "The spooled texts of a process that is killed end with it, whatever their size."
    (tmp_path / "temporary").mkdir()
    code = (
        "import os, signal; from langmlm.text.corpus import open_corpus\n"
        "corpus = open_corpus(f'text {number}' for number in range(100_000))\n"
        "assert sum(1 for _ in corpus) == 100_000\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([forked_python(), "-c", code], env=environment).returncode == -signal.SIGKILL
    assert not list((tmp_path / "temporary").glob("langmlm-*"))


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
