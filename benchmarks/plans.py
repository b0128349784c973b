"""Measure how long a batch plan takes to start and to find a step, and what packing in chunks costs.

    python benchmarks/plans.py

The lengths of up to 10^9 sequences are computed when they are read, so that only the plan uses memory. Times are
processor times, the best of three. Results go to `results/plans.json` in about a minute.
"""

import argparse
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from langmlm.data.batching import BatchPlan, pack_sequences, random_uniform, shuffled_order

RESULT = Path(__file__).parent / "results" / "plans.json"
SIZES = [10**exponent for exponent in range(5, 10)]  # Sequences
PACKED = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]  # Sequences of the datasets whose epochs are packed as a whole
EPOCHS = 1_000
PROCESSES = 8
OPTIONS = {"seed": 42, "token_budget": 32 * 512, "sequences_per_batch": None, "batches_per_step": 2 * PROCESSES}


class ComputedLengths:
    "Lengths of documents of 8 to 512 tokens, many short ones and a long tail, which are not stored."

    def __init__(self, sequences: int):
        self.sequences = sequences

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return (8 * 64 ** random_uniform(1, rows)).astype(np.int32)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    "Return the seconds of processor time that an action takes, and its result."
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


def measure_plan(sequences: int) -> dict[str, Any]:
    "Measure start, seek, the turn of an epoch with the next chunk prepared, and the memory of all of it."

    def make() -> BatchPlan:
        return BatchPlan(ComputedLengths(sequences), **OPTIONS, num_train_epochs=EPOCHS)

    tracemalloc.start()  # In a run of its own, since it slows everything down
    make().batches(1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rounds = []
    for _ in range(3):
        start, plan = timed(make)
        last_of_epoch = EPOCHS // 2 * plan.steps_per_epoch - 1
        seek, _ = timed(lambda: plan.batches(last_of_epoch))
        plan.plan_ahead(last_of_epoch)
        turn, _ = timed(lambda: plan.batches(last_of_epoch + 1))
        rounds.append({"start": start, "seek": seek, "epoch_turn": turn})
    best = {name: round(min(one[name] for one in rounds), 6) for name in rounds[0]}
    return {"seconds": best, "peak_bytes": peak, "steps_per_epoch": plan.steps_per_epoch}


def measure_packing(sequences: int, epochs: int) -> dict[str, Any]:
    "Compare the micro-batches of whole epochs with those of packing the same order without chunks and steps."
    lengths = ComputedLengths(sequences)[np.arange(sequences)]
    plan, greedy, planned = BatchPlan(lengths, **OPTIONS, num_train_epochs=epochs), [], []
    for epoch in range(epochs):
        order = shuffled_order(sequences, plan.seed, epoch)
        greedy.append(len(pack_sequences(lengths[order], plan.token_budget)) - 1)
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        planned += [len(plan.batches(step)[1]) for step in steps]

    def idle(counts: list[int]) -> float:
        "Return the share of the turns of all processes without a micro-batch."
        return 1 - sum(counts) / sum(-(-count // PROCESSES) * PROCESSES for count in counts)

    return {
        "epochs": epochs,
        "micro_batches": sum(planned),
        "micro_batches_without_chunks": sum(greedy),
        "complete_steps": sum(batches == plan.batches_per_step for batches in planned) / len(planned),
        "idle": idle(planned),
        "idle_without_chunks": idle(greedy),
    }


def main() -> None:
    "Measure, and write the results."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="file to write")
    out = parser.parse_args().out
    result = {
        "plans": {str(size): measure_plan(size) for size in SIZES},
        "packing": {str(size): measure_packing(size, max(1, min(20, 3_000_000 // size))) for size in PACKED},
        "epochs": EPOCHS,
        "processes": PROCESSES,
        "options": OPTIONS,
        "device": f"cpu, {os.cpu_count()} cores",
        "machine": platform.machine(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
