"""Time and peak memory of tokenizing generated text of several sizes, and kills at random moments.

    python benchmarks/scale.py growth --write --megabytes 10 100 1000
    python benchmarks/scale.py growth --write --megabytes 10000
    python benchmarks/scale.py kills --write --number 20

Each size is generated, tokenized in a separate process, and deleted. Results are merged into results/scale.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "scale.json"
SEED = 42
WORDS = 50_000  # Distinct words in the generated text, with the frequencies of natural language
WORDS_PER_BLOCK = 200_000
SAMPLE_MEGABYTES = 5  # Of text that trains the tokenizer


def write_text(file: Path, megabytes: int) -> None:
    "Generate distinct documents of one to several hundred words, until the file has the size."
    draw = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters[:20], size=draw.integers(1, 11))) for _ in range(WORDS)]
    shares = 1 / np.arange(2, WORDS + 2)
    written = number = 0
    with open(file, "w", encoding="utf-8") as stream:
        while written < megabytes * 1_000_000:
            chosen = [words[index] for index in draw.choice(WORDS, WORDS_PER_BLOCK, p=shares / shares.sum())]
            ends = np.cumsum(draw.geometric(1 / 25, WORDS_PER_BLOCK // 25))
            for begin, end in zip(ends, ends[1:]):
                number += 1
                written += stream.write(f"{number} {' '.join(chosen[begin:end])}.\n")


def make_tokenizer(folder: Path) -> Path:
    "Train a tokenizer with 16,000 tokens on a sample of the text."
    from langmlm import tasks

    write_text(folder / "sample.txt", SAMPLE_MEGABYTES)
    config = {"vocab_size": 16_000, "path_to_save_tokenizer": folder / "tokenizer"}
    tasks.create_tokenizer(folder / "sample.txt", config | {"path_to_save_dataset": folder / "sample"}).train()
    return folder / "tokenizer"


def tokenize(text: str, tokenizer: str, target: str) -> None:
    "Tokenize in a child process, and print time and memory."
    from langmlm.text.corpus import open_corpus
    from langmlm.tokens.shards import write_dataset
    from langmlm.tokens.tokenizer import TokenizerConfig, load_tokenizer

    loaded, corpus, config = load_tokenizer(tokenizer), open_corpus(text), TokenizerConfig(path_to_save_dataset=target)
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, worked = time.perf_counter(), time.process_time()
    report = write_dataset(corpus, loaded, config)
    times = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
    made = {"documents": report["statistics"]["documents"], "tokens": report["tokens"], "files": sum(name.endswith(".arrow") for name in report["files"])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(made | times | {"peak_resident": peak, "resident_at_start": at_start}))


def measure(folder: Path, tokenizer: Path, megabytes: int) -> dict:
    "Measure one size, from text to dataset, in a fresh process."
    text, target = folder / "text.txt", folder / "dataset"
    write_text(text, megabytes)
    command = [sys.executable, __file__, "child", str(text), str(tokenizer), str(target)]
    finished = subprocess.run(command, capture_output=True, text=True, env=variables())
    if finished.returncode:
        raise SystemExit(finished.stderr)
    figures = json.loads(finished.stdout.splitlines()[-1])
    figures |= {"bytes": text.stat().st_size}
    figures |= {"microseconds_per_token": 1e6 * figures["processor_seconds"] / figures["tokens"]}  # Summed over all cores
    text.unlink()
    shutil.rmtree(target)
    return figures | circumstances()


def kill(folder: Path, tokenizer: Path, number: int, megabytes: int) -> dict:
    "Kill a job at random moments, resume it each time, and compare the result with that of an undisturbed job."
    sys.path[:0] = [str(ROOT / "tests" / "integration"), str(ROOT / "tools")]
    from kills import kill_often

    text, target = folder / "text.txt", folder / "dataset"
    write_text(text, megabytes)
    config = {"max_length": 64, "split_on": "sentence", "validation_fraction": 0.1, "path_to_save_dataset": str(target)}
    outcome = kill_often((str(text), str(tokenizer), 500_000, config), target, number, SEED)
    return outcome | {"kills": number, "megabytes": megabytes} | circumstances()


def circumstances() -> dict:
    "Return date, cores and versions."
    versions = {name: version(name) for name in ("tokenizers", "datasets", "pyarrow", "numpy")}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count(), "versions": versions}


def variables() -> dict[str, str]:
    "Return the environment of processes that import this checkout."
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def store(kind: str, figures: dict) -> None:
    "Merge figures into the stored results."
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[kind] = results.get(kind, {}) | figures
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    "Parse the command line, and measure."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["growth", "kills"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1_000], help="sizes of the text")
    parser.add_argument("--number", type=int, default=20, help="number of kills")
    parser.add_argument("--work", type=Path, help="folder for temporary text and datasets; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULTS.name}")
    given = parser.parse_args()
    keep = store if given.write else lambda kind, figures: None
    if given.work:
        given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        tokenizer = make_tokenizer(Path(scratch))
        if given.what == "kills":
            figures = kill(Path(scratch), tokenizer, given.number, given.megabytes[0])
            print(json.dumps(figures, indent=1))
            keep("kills", figures)
        for megabytes in given.megabytes if given.what == "growth" else []:
            figures = measure(Path(scratch), tokenizer, megabytes)
            print(megabytes, json.dumps(figures), flush=True)
            keep("growth", {str(megabytes): figures})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        tokenize(*sys.argv[2:])
    else:
        main()
