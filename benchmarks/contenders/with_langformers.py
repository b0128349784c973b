"""Langformers, as its page on pretraining sets it up: rows padded to max_length, its own Trainer, fp32.

Differences from the page:
- the tokenizer is the shared one, passed as `tokenizer=` (as its page on further pretraining does);
- `max_steps` and `save_strategy="no"`, which it passes to the Trainer;
- its linear schedule depends on `num_train_epochs` and cannot be changed: where the other contenders have a constant
  learning rate, it gets so many epochs that its rate is almost constant.
"""

import os
from pathlib import Path

import numpy as np
import transformers.trainer
from datasets import load_from_disk
from langformers import tasks
from pacing import Channel, bytes_on_disk, serve
from stock_hooks import StepHook, make_pacer
from transformers import set_seed

CONSTANT = 100  # The schedule is this many times as long as the run, so the learning rate falls by 1%


def prepare(channel: Channel, job: dict) -> None:
    "Tokenize the text into `tokenized_dataset` in the working directory."
    folder = Path(job["dataset"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(folder.parent)
    tasks.create_tokenizer(data_path=job["text"], tokenizer=job["tokenizer"]).train()
    os.rename("tokenized_dataset", folder)
    rows = load_from_disk(str(folder))["train"]
    chunks = rows.data.column("attention_mask").chunks
    tokens = sum(int(np.asarray(chunk.flatten()).sum(dtype=np.int64)) for chunk in chunks)
    channel.send(tokens=tokens, sequences=len(rows), bytes=bytes_on_disk(str(folder)))


def train(channel: Channel, job: dict) -> None:
    "Train until the runner stops it."
    Path(job["run_folder"]).mkdir(parents=True)
    os.chdir(job["run_folder"])
    set_seed(job["seed"])
    steps_per_epoch = len(load_from_disk(job["dataset"])["train"]) // job["batch_size"] + 1
    longer = CONSTANT if job["lr_scheduler_type"] == "constant_with_warmup" else 1
    epochs = -(-job["max_steps"] * longer // steps_per_epoch)
    task = tasks.create_mlm(
        tokenizer=job["tokenizer"],
        tokenized_dataset=job["dataset"],
        model_config=job["model"],
        training_config={
            "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": 1,
            "num_train_epochs": epochs,
            "learning_rate": job["learning_rate"],
            "warmup_ratio": (job["warmup_steps"] + 0.5) / (steps_per_epoch * epochs),
            "mlm_probability": job["mlm_probability"],
            "save_strategy": "no",
            "max_steps": job["max_steps"],
            "seed": job["seed"],
            "bf16": job["precision"] == "bf16",
            "use_cpu": job["device"] == "cpu",
            "disable_tqdm": True,
        },
    )
    pacer = make_pacer(channel, job, task.model)
    transformers.trainer.DEFAULT_CALLBACKS.append(StepHook(pacer))
    pacer.begin()
    task.train()


if __name__ == "__main__":
    serve({"prepare": prepare, "train": train})
