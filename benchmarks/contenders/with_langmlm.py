"langmlm, as its README sets it up."

import logging

import numpy as np
from pacing import Channel, Pacer, bytes_on_disk, serve

from langmlm import tasks
from langmlm.train.checkpoint import save_model


class StepHook(logging.Handler):
    "Handles the record that the loop logs every `logging_steps`: makes the loop wait, and log less often."

    def __init__(self, task: tasks.MLMTask):
        super().__init__()
        self.task, self.pacer, self.counted, self.tokens, self.computed = task, None, 0, 0, 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("step "):
            self.pacer.step_done(self.task.state.step - self.pacer.steps)
            if interval := self.pacer.command.get("interval"):
                object.__setattr__(self.task.config, "logging_steps", interval)  # The loop reads it at every step

    def totals(self) -> tuple[int, int]:
        "Return the tokens of all steps so far, from the batch plan, and the same with the padding from the log."
        task, before = self.task, self.tokens
        for step in range(self.counted, task.state.step):
            _, rows = task.loader.plan.batches(step)
            self.tokens += int(task.dataset.lengths[np.concatenate(rows)].sum())
        self.counted = task.state.step
        padding = task.state.log_history[-1]["padding_share"] if task.state.log_history else 0.0
        self.computed += (self.tokens - before) / (1 - padding)
        return self.tokens, round(self.computed)

    def mfu(self) -> dict[str, float]:
        "Return the model FLOPs utilization of the latest log entry."
        return {"mfu": self.task.state.log_history[-1]["mfu"]}


def prepare(channel: Channel, job: dict) -> None:
    "Tokenize the text."
    made = tasks.create_tokenizer(
        data_path=job["text"],
        tokenizer=job["tokenizer"],
        tokenizer_config={"max_length": job["max_length"], "path_to_save_dataset": job["dataset"]},
    ).train()
    channel.send(tokens=made["tokens"], sequences=made["sequences"], bytes=bytes_on_disk(job["dataset"]))


def training_config(job: dict) -> dict:
    "Return the options of the run; with a recipe, it chooses those that are compared elsewhere."
    config = {
        "output_dir": job["run_folder"],
        "max_steps": job["max_steps"],
        "logging_steps": job["logging_steps"],
        "save_strategy": "no",
        "seed": job["seed"],
        "bf16": job["precision"] == "bf16",
        "torch_compile": job.get("torch_compile", job["device"] == "cuda"),
        "use_cpu": job["device"] == "cpu",
        "disable_tqdm": True,
        **job.get("options", {}),
    }
    if config.get("recipe"):
        return config
    return {
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": 1,
        "packing": job["packing"],
        "fill_batches": job["packing"],  # Not its default: the token budget and the learning rate are those of the peers
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": job["lr_scheduler_type"],
        "warmup_steps": job["warmup_steps"],
        **job["adamw"],
        "mlm_probability": job["mlm_probability"],
        **config,
    }


def train(channel: Channel, job: dict) -> None:
    "Train until the runner stops it."
    task = tasks.create_mlm(
        tokenizer=job["tokenizer"],
        tokenized_dataset=job["dataset"],
        model_config=job["model"],
        training_config=training_config(job),
    )
    hook = StepHook(task)
    hook.pacer = Pacer(
        channel, job, hook.totals, lambda folder: save_model(folder, task.model, task.tokenizer), hook.mfu
    )
    logger = logging.getLogger("langmlm.train.loop")
    logger.setLevel(logging.INFO)
    logger.addHandler(hook)
    hook.pacer.begin()
    task.train()


if __name__ == "__main__":
    serve({"prepare": prepare, "train": train})
