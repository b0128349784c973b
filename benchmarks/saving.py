"""Measure which share of the training time of roberta-base goes into checkpoints, at `save_steps=100`.

    python benchmarks/saving.py

A few steps and a few saves are timed on this machine, in turns. A step of the default config has 32 x 512 x 2 tokens;
on a CPU such a step takes minutes, so shorter ones are timed and taken at their tokens per second. The figures go to
`results/saving.json`.
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
from functools import partial
from statistics import median

import torch
import transformers
from datasets import Dataset

from langmlm.data.dataset import TokenizedDataset
from langmlm.model.roberta import ModelConfig, build_model, roberta_config
from langmlm.tasks import MLMTask
from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer
from langmlm.train.config import TrainingConfig
from langmlm.train.loop import train_step

RESULT = Path(__file__).parent / "results" / "saving.json"
SAVE_STEPS = 100
DEFAULT_TOKENS = 32 * 512 * 2  # Of a step with all defaults and `max_length=512`
FAST_GPU = 0.8e6  # Tokens per second, the aim on an H100


def make_task(folder: str) -> MLMTask:
    "A run of roberta-base whose steps have 1,024 tokens."
    tokenizer = train_tokenizer(islice(docstrings(), 2_000), TokenizerConfig(vocab_size=1_000, max_length=512))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 1_000, (64, 512), generator=draw).tolist()
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": rows}))
    model = build_model(roberta_config(ModelConfig(vocab_size=50_265), tokenizer, max_length=512))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_total_limit": 1}
    return MLMTask(model, tokenizer, dataset, TrainingConfig(output_dir=folder, **settings))


def timed(action: Callable[[], object]) -> float:
    "Return the seconds that a call takes."
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def one_step(task: MLMTask) -> float:
    "Do a step, and return its seconds."
    batches, parts = task.loader.load(task.state.step), (task.module, task.optimizer, task.accelerator)

    def step() -> None:
        task.state.add(train_step(*parts, batches, task.state.step, 1e-5, task.config))
        task.state.read_metrics(task.accelerator)  # Waits for the device

    return timed(step)


def main() -> None:
    "Measure, and store the figures."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of a step and a save each")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(f"{folder}/run")
        one_step(task)  # Warms up
        with task.run_folder.hold(task.state.step):
            save = partial(task.run_folder.save, task.model, task.optimizer, task.state)
            times = [(one_step(task), timed(save)) for _ in range(rounds)]
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
        "device": f"{task.accelerator.device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
