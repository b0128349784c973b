"""Measure how long a dataset of many sequences takes to open and to find a step of a run, and the memory of a process.

    python benchmarks/opening.py --work FOLDER

Datasets of up to 10^9 sequences of one to three tokens are written, 8 GB in all, in files of the size that tokenizing
makes of them. Each is measured in processes of its own: processor times, the best of three, and the memory that belongs
to the process alone. The files are in the page cache, which all processes share. Results go to `results/opening.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from plans import timed

from langmlm.data.batching import BatchPlan, make_flat_batch
from langmlm.data.dataset import open_dataset
from langmlm.disk import write_json, write_manifest
from langmlm.tokens.encode import write_sequences

RESULT = Path(__file__).parent / "results" / "opening.json"
SIZES = [10**exponent for exponent in range(6, 10)]  # Sequences
ROWS_PER_FILE = 2_800_000  # As many as tokenizing writes of sequences this short
OPTIONS = {"seed": 42, "token_budget": 32 * 512, "sequences_per_batch": None, "batches_per_step": 16}
ROUNDS = 3


def write_rows(folder: Path, sequences: int) -> None:
    "Write a dataset of random ids, as `write_dataset` does, unless it exists."
    if folder.exists():
        return
    train, rng, tokens, names = folder / "train", np.random.default_rng(0), 0, []
    train.mkdir(parents=True)
    ids = rng.integers(5, 400, 3 * ROWS_PER_FILE, dtype=np.uint16)
    for first in range(0, sequences, ROWS_PER_FILE):
        lengths = rng.integers(1, 4, min(ROWS_PER_FILE, sequences - first), dtype=np.int32)
        names.append(f"data-{first // ROWS_PER_FILE:05}-of-{-(-sequences // ROWS_PER_FILE):05}.arrow")
        write_sequences(train / names[-1], ids[: lengths.sum()], lengths)
        tokens += int(lengths.sum())
    features = Features({"input_ids": List(Value("uint16"))}).to_dict()
    write_json(train / "dataset_info.json", {"citation": "", "description": "", "features": features})
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    write_json(train / "state.json", state)
    write_json(folder / "dataset_dict.json", {"splits": ["train"]})
    facts = {"sequences": sequences, "tokens": tokens, "content": "", "token_counts": str(tokens)}
    write_manifest(folder, "dataset", {"max_length": 3, "tokenizer": "", "splits": {"train": facts}} | facts)


def private_memory() -> int:
    "Return the bytes of memory that belong to this process alone."
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1_024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, trace: bool) -> dict[str, Any]:
    "Open a dataset, plan a run, find a step in its middle, and make a batch; return times and memory."
    seconds, before = {}, private_memory()

    def measured(name: str, action: Callable[[], Any]) -> Any:
        elapsed, result = timed(action)
        seconds[name] = round(elapsed, 4)
        return result

    if trace:
        tracemalloc.start()
    dataset = measured("open", lambda: open_dataset(folder))
    measured("tokens", lambda: (dataset.tokens, dataset.max_length))
    plan = measured("plan", lambda: BatchPlan(dataset.lengths, **OPTIONS, num_train_epochs=1_000))
    _, rows = measured("seek", lambda: plan.batches(plan.total_steps // 2))
    measured("first_batch", lambda: make_flat_batch(dataset, rows[0], pad_token_id=1))
    if trace:
        return {"peak_bytes": tracemalloc.get_traced_memory()[1]}
    return {"seconds": seconds, "private_bytes": private_memory() - before}


def in_process(folder: Path, *options: str) -> dict[str, Any]:
    "Measure in a new process."
    command = [sys.executable, __file__, "--work", str(folder), "--measure", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    "Write the datasets, measure, and write the results."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the datasets, to be deleted afterwards")
    parser.add_argument("--out", type=Path, default=RESULT, help="file to write")
    parser.add_argument("--measure", action="store_true", help="measure one dataset, in this process")
    parser.add_argument("--trace", action="store_true", help="measure the peak of its memory instead of its times")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.work, arguments.trace)))
        return
    sizes = {}
    for size in SIZES:
        folder = arguments.work / str(size)
        write_rows(folder, size)
        rounds = [in_process(folder) for _ in range(ROUNDS)]
        sizes[str(size)] = {
            "seconds": {name: min(one["seconds"][name] for one in rounds) for name in rounds[0]["seconds"]},
            "private_bytes": max(one["private_bytes"] for one in rounds),
            "files": len(list((folder / "train").glob("*.arrow"))),
            "offset_bytes": 4 * size,
        } | in_process(folder, "--trace")
    result = {
        "datasets": sizes,
        "options": OPTIONS,
        "device": f"cpu, {os.cpu_count()} cores",
        "machine": platform.machine(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__},
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
