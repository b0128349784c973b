"""Compare learning rates and batch sizes on short lines: what packing changes, and how the learning rate follows.

    python benchmarks/short_lines.py --short-lines lines.txt --long-documents books.txt

The reference has lines as Langformers batches them: `per_device_train_batch_size` lines in a micro-batch, whatever their
length (`packing=False`). Every other run sees the same lines as often, in larger steps. Texts are shuffled, and 5% of
the documents are held out. Each run is a process of its own; results go to `results/short_lines.json` after each, and a
repeated command only does what is missing. Results of another text are not mixed: choose another `--out`.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from data import SEED, describe_once, hash_text, read_text, split_documents

RESULT = Path(__file__).parent / "results" / "short_lines.json"
SIZES = {"4x128": (4, 128), "4x256": (4, 256), "12x256": (12, 256), "12x384": (12, 384), "12x768": (12, 768)}
TEXTS = {"short": 25_000, "long": None}  # Lines to train on; long: documents of about as many tokens
CHARACTERS = 3_200_000  # Of the long documents
VOCABULARY, MAX_LENGTH = 8_192, 512
CONFIG = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
PARTS = ["4x128", "4x256", "muon", "factors", "long", "deep"]
CURVE = 8  # Points of each loss curve


@dataclass(frozen=True)
class Setting:
    "One run: a text, a size, and what differs from `CONFIG` and from the defaults."

    text: str
    size: str
    changes: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        changes = ", ".join(f"{name}={value}" for name, value in self.changes.items())
        return f"{self.text} {self.size}: {changes or 'as configured'}"


def prepare(work: Path, kind: str, file: Path) -> dict:
    "Train the tokenizer and tokenize a text with 5% held out, once; describe it."
    from langmlm import tasks

    lines = split_documents(read_text(file), kind)
    random.Random(SEED).shuffle(lines)
    lines = lines[: round(TEXTS[kind] / 0.95)] if TEXTS[kind] else take_characters(lines, CHARACTERS)
    text = work / f"{kind}.txt"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folders = {"path_to_save_tokenizer": str(work / f"{kind}-tok"), "path_to_save_dataset": str(work / f"{kind}-data")}
    options = {"vocab_size": VOCABULARY, "max_length": MAX_LENGTH, "validation_fraction": 0.05}
    tasks.create_tokenizer(str(text), options | folders).train()
    from langmlm.data.dataset import open_dataset, unigram_entropy

    dataset = open_dataset(folders["path_to_save_dataset"])
    entropy = unigram_entropy(dataset, range(5))
    sizes = {"documents": len(lines), "sequences": len(dataset), "tokens": dataset.tokens}
    return sizes | {"mean_length": dataset.tokens / len(dataset), "unigram_entropy": entropy}


def take_characters(documents: list[str], characters: int) -> list[str]:
    "Return the first documents that have a number of characters together."
    total, kept = 0, []
    for document in documents:
        if total >= characters:
            break
        kept.append(document[: characters - total])
        total += len(kept[-1])
    return kept


def train(work: Path, setting: Setting) -> dict:
    "Do one run; return its steps, loss curve and CPU seconds."
    from langmlm import tasks

    layers, width = SIZES[setting.size]
    model = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    model["num_attention_heads"] = width // 64
    changes = dict(setting.changes)
    stop_at = changes.pop("stop_at_step", None)
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"output_dir": folder, "save_strategy": "no", "on_loss_spike": "ignore", "bf16": False}
        config |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 20, "eval_steps": 10**9} | changes
        parts = [str(work / f"{setting.text}-{part}") for part in ("tok", "data")]
        task = tasks.create_mlm(*parts, model, config)
        plan = task.loader.plan
        config["eval_steps"] = max(1, (stop_at or plan.total_steps) // CURVE)
        task = tasks.create_mlm(*parts, model, config)
        began = time.process_time()
        log = task.train(stop_at_step=stop_at).log_history
    seconds = time.process_time() - began
    curve = [[entry["step"], round(entry["eval_loss"], 4)] for entry in log if "eval_loss" in entry]
    training = [
        [entry["step"], round(entry["loss"], 3), round(entry["grad_norm"], 2)] for entry in log if "loss" in entry
    ]
    every = max(1, len(training) // 20)
    return {
        "steps": plan.total_steps,
        "tokens_per_step": task.arithmetic().tokens_per_step,
        "loss": curve[-1][1],
        "curve": curve,
        "training": training[::every],
        "cpu_seconds": round(seconds),
    }


def study(size: str) -> list[Setting]:
    "Return the runs on short lines at one size: the reference, full batches, a quarter of the batch, and the default."
    full, quarter = {"fill_batches": True}, {"fill_batches": True, "per_device_train_batch_size": 1}
    return [
        Setting("short", size, {"packing": False}),
        *(Setting("short", size, full | {"learning_rate": rate}) for rate in (2e-4, 8e-4)),
        *(Setting("short", size, quarter | {"learning_rate": rate}) for rate in (4e-4, 5.66e-4, 8e-4)),
        Setting("short", size),
    ]


def runs(parts: list[str]) -> list[Setting]:
    "Return the settings of the named parts of the study."
    twice = [Setting("short", "4x256", changes | {"seed": 43}) for changes in ({"packing": False}, {})]
    rates = (None, 8e-4, 1.6e-3)  # The default, and what is too high for a deep model
    known = {
        "4x128": study("4x128"),
        "4x256": study("4x256") + twice,
        "muon": [Setting("short", "4x256", {"optim": "muon"} | changes) for changes in ({"packing": False}, {})],
        "factors": [
            Setting("short", "4x256", change)
            for change in ({"adam_beta2": 0.95}, {"warmup_ratio": 0.1}, {"weight_decay": 0.1})
        ],
        "long": [Setting("long", "4x256"), Setting("long", "4x256", {"fill_batches": True})],
        "deep": [
            Setting("short", size, ({"learning_rate": rate} if rate else {}) | {"stop_at_step": steps})
            for size, steps in (("12x256", 400), ("12x768", 80))
            for rate in rates
        ],
    }
    return [setting for part in parts for setting in known[part]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short-lines", type=Path, required=True, help="text file, one document per line")
    parser.add_argument("--long-documents", type=Path, help="text file, documents separated by empty lines")
    parser.add_argument("--describe", action="append", default=[], metavar="TEXT=WORDS", help="short=..., long=...")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="parts of the study")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "short-lines")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results, which may have some")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results = json.loads(options.out.read_text()) if options.out.exists() else {"texts": {}, "runs": {}}
    options.work /= hash_text(options.short_lines, options.long_documents)
    options.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for kind, file in (("short", options.short_lines), ("long", options.long_documents)):
            if file:
                facts = options.work / f"{kind}.json"
                text = describe_once(facts, lambda: pool.submit(prepare, options.work, kind, file).result())
                if not text.items() <= results["texts"].setdefault(kind, text).items():
                    parser.error(f"{options.out} has runs on another text: choose another --out")
                print(kind, results["texts"][kind], flush=True)
    for kind, words in (text.split("=", 1) for text in options.describe):
        results["texts"][kind]["description"] = words
    wanted = [setting for setting in runs(options.parts) if setting.name not in results["runs"]]
    with ProcessPoolExecutor(options.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, options.work, setting): setting for setting in wanted}
        for future in as_completed(futures):
            setting, result = futures[future], future.result()
            results["runs"][setting.name] = vars(setting) | result
            results |= {"date": str(date.today()), "machine": platform.machine(), "config": CONFIG}
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(setting.name, result["steps"], result["loss"], result["cpu_seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
