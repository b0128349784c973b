"""Measure the share of the training time of roberta-base that checkpoints take, with `save_steps=100`.

    python benchmarks/saving.py --write

Steps and saves alternate. A step of the default configuration has 32 x 512 x 2 tokens, which takes minutes on a CPU, so
shorter steps are timed and scaled by their tokens per second. Results go to `results/saving.json` in half a minute.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import transformers
from datasets import Dataset

from langmlm.data.dataset import TokenizedDataset
from langmlm.model.roberta import ModelConfig, build_model, complete_config
from langmlm.tasks import MLMTask
from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer
from langmlm.train.config import TrainingConfig
from langmlm.train.loop import train_step
from langmlm.train.sharding import gather_run

RESULT = Path(__file__).parent / "results" / "saving.json"
SAVE_STEPS = 100
DEFAULT_TOKENS = 32 * 512 * 2  # Of a step with all defaults and `max_length=512`
FAST_GPU = 0.8e6  # Tokens per second


def make_task(folder: str) -> MLMTask:
    "Prepare a run of roberta-base whose steps have 1,024 tokens."
    tokenizer = train_tokenizer(islice(docstrings(), 2_000), TokenizerConfig(vocab_size=1_000, max_length=512))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 1_000, (64, 512), generator=generator).tolist()
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": rows}))
    model = build_model(complete_config(ModelConfig(vocab_size=50_265), tokenizer, max_length=512), seed=0)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_total_limit": 1}
    return MLMTask(model, tokenizer, dataset, TrainingConfig(output_dir=folder, **settings))


def timed(action: Callable[[], object]) -> float:
    "Return the seconds that an action takes."
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def time_step(task: MLMTask) -> float:
    "Do a training step; return its seconds."
    step, batches = task.state.step, task.loader.load(task.state.step)

    def action() -> None:
        metrics = train_step(task.module, task.optimizer, task.accelerator, batches, step, 1e-5, task.config)
        task.state.add(metrics)
        metrics.tolist()  # Waits for the device

    return timed(action)


def time_save(task: MLMTask) -> float:
    "Save a checkpoint; return its seconds."
    task.state.read_metrics(task.accelerator)
    return timed(lambda: task.run_folder.save(*gather_run(task.model, task.optimizer), task.state))


def main() -> None:
    "Measure, and write the results."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of steps and saves, at least 1")
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    rounds = max(1, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(f"{folder}/run")
        time_step(task)  # Warm-up
        with task.run_folder.hold(task.state.step):
            times = [(time_step(task), time_save(task)) for _ in range(rounds)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("checkpoint-*/*"))
    step, save = (median(column) for column in zip(*times))
    speed = 2 * 512 / step
    share = {
        pace: save / (SAVE_STEPS * DEFAULT_TOKENS / tokens + save)
        for pace, tokens in (("here", speed), ("gpu", FAST_GPU))
    }
    result = {
        "seconds_of_a_save": [round(seconds, 3) for _, seconds in times],
        "seconds_of_a_step_of_1024_tokens": [round(seconds, 3) for seconds, _ in times],
        "tokens_per_second": round(speed, 1),
        "megabytes_of_a_checkpoint": round(size / 1e6, 1),
        "share_of_training_time": round(share["here"], 6),
        "share_if_steps_ran_at_800000_tokens_per_second_and_saves_as_here": round(share["gpu"], 4),
        "save_steps": SAVE_STEPS,
        "tokens_of_a_default_step": DEFAULT_TOKENS,
        "precision": task.run_folder.precision,
        "device": f"{task.accelerator.device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used",
        "machine": platform.machine(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
