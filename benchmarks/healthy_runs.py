"""Train twenty different runs in which nothing is wrong, and count the loss spikes that are detected: all are false alarms.

`python benchmarks/healthy_runs.py --write` stores the results in `benchmarks/results`, and the chapter on loss spikes shows them.
"""

import argparse
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

from langmlm import tasks
from langmlm.text.corpus import docstrings

RESULT = Path(__file__).resolve().parent / "results" / "healthy_runs.json"
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
DEEP = {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
WIDE = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
COMMON = {"max_steps": 500, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False}
COMMON |= {"logging_steps": 1, "save_strategy": "no", "on_loss_spike": "warn", "disable_tqdm": True}
RUNS = [  # Documents, architecture, options that differ
    (1_500, SMALL, {"learning_rate": 1e-3}),
    (1_500, SMALL, {"learning_rate": 3e-4, "seed": 1}),
    (1_500, SMALL, {"learning_rate": 3e-3, "seed": 2}),
    (1_500, SMALL, {"learning_rate": 1e-2, "seed": 3}),
    (1_500, TINY, {"learning_rate": 3e-3}),
    (1_500, DEEP, {"learning_rate": 1e-3, "max_steps": 300}),
    (1_500, WIDE, {"learning_rate": 5e-4, "max_steps": 300}),
    (12, SMALL, {"learning_rate": 2e-3}),
    (12, TINY, {"learning_rate": 1e-2, "max_steps": 1_000, "seed": 4}),
    (40, SMALL, {"learning_rate": 2e-3, "gradient_accumulation_steps": 3, "seed": 5}),
    (1_500, SMALL, {"optim": "muon", "learning_rate": 1e-3}),
    (1_500, SMALL, {"optim": "muon", "learning_rate": 4e-3, "seed": 6}),
    (40, DEEP, {"optim": "muon", "learning_rate": 1e-3, "max_steps": 300}),
    (1_500, SMALL, {"packing": False, "per_device_train_batch_size": 2, "learning_rate": 1e-3}),
    (1_500, SMALL, {"packing": False, "per_device_train_batch_size": 1, "learning_rate": 2e-3, "max_steps": 2_000}),
    (40, SMALL, {"packing": False, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "seed": 7}),
    (1_500, SMALL, {"warmup_ratio": 0.0, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}),
    (1_500, SMALL, {"warmup_ratio": 0.5, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "seed": 8}),
    (1_500, SMALL, {"whole_word_masking": True, "mlm_probability": 0.3, "learning_rate": 2e-3}),
    (6_000, SMALL, {"learning_rate": 1e-3, "max_grad_norm": 0.0, "adam_beta2": 0.999, "max_steps": 3_000}),
]


def train(number: int, folder: Path, **changes) -> dict:
    "Train one of the runs in a folder, and return its results; the data is created there if it is missing."
    documents, architecture, options = RUNS[number]
    data = folder / f"data-{documents}"
    if not data.is_dir():
        data.mkdir()
        (data / "text.txt").write_text("\n".join(islice(docstrings(), documents)), encoding="utf-8")
        paths = {"path_to_save_tokenizer": data / "tokenizer", "path_to_save_dataset": data / "dataset"}
        settings = {"vocab_size": 1_000 if documents > 100 else 300, "max_length": 64, **paths}
        tasks.create_tokenizer(data / "text.txt", settings).train()
    task = tasks.create_mlm(
        tokenizer=data / "tokenizer",
        tokenized_dataset=data / "dataset",
        model_config=architecture,
        training_config={**COMMON, **options, **changes, "output_dir": folder / f"run-{number}"},
    )
    log = task.train().log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {
        "documents": documents,
        "parameters": task.model.num_parameters(),
        "settings": options,
        "steps": len(losses),
        "first_loss": round(losses[0], 3),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 3),
        "alarms": sum("loss_spike" in entry for entry in log),
    }


def main() -> int:
    "Train all runs, one after the other."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for number in range(len(RUNS)):
            results.append(train(number, Path(folder)))
            print(results[-1], flush=True)
    if arguments.write:
        RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    alarms = sum(result["alarms"] for result in results)
    steps = sum(result["steps"] for result in results)
    print(f"{len(results)} runs, {steps:,} steps, false alarms: {alarms}")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
