"langmlm, as its README sets it up."

import logging

import numpy as np
from pacing import Channel, Pacer, bytes_on_disk, serve

from langmlm import tasks
from langmlm.checkpoint import save_model


class StepHook(logging.Handler):
    "The loop logs one record every `logging_steps`; what handles the record can make the loop wait."

    def __init__(self, task: tasks.MLMTask):
        super().__init__()
        self.task, self.pacer, self.counted, self.tokens = task, None, 0, 0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("step "):
            self.pacer.step_done(self.task.run.step - self.pacer.steps)

    def totals(self) -> tuple[int, int]:
        "Tokens of all steps so far, as the plan of the run has them. Without padding, all that is computed is real."
        run = self.task.run
        for step in range(self.counted, run.step):
            self.tokens += int(run.corpus.lengths[np.concatenate(run.plan.batches(step)[1])].sum())
        self.counted = run.step
        return self.tokens, self.tokens


def prepare(channel: Channel, job: dict) -> None:
    "Tokenize the text."
    made = tasks.create_tokenizer(
        data_path=job["text"],
        tokenizer=job["tokenizer"],
        tokenizer_config={"max_length": job["max_length"], "path_to_save_dataset": job["dataset"]},
    ).train()
    channel.send(tokens=made["tokens"], sequences=made["sequences"], bytes=bytes_on_disk(job["dataset"]))


def train(channel: Channel, job: dict) -> None:
    "Train until the runner has seen enough."
    task = tasks.create_mlm(
        tokenizer=job["tokenizer"],
        tokenized_dataset=job["dataset"],
        model_config=job["model"],
        training_config={
            "output_dir": job["run_folder"],
            "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": 1,
            "packing": job["packing"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": job["lr_scheduler_type"],
            "warmup_steps": job["warmup_steps"],
            **job["adamw"],
            "mlm_probability": job["mlm_probability"],
            "max_steps": job["max_steps"],
            "logging_steps": job["logging_steps"],
            "save_strategy": "no",
            "seed": job["seed"],
            "bf16": job["precision"] == "bf16",
            "use_cpu": job["device"] == "cpu",
            "disable_tqdm": True,
        },
    )
    hook = StepHook(task)
    hook.pacer = Pacer(channel, job, hook.totals, lambda folder: save_model(folder, task.run.stock, task.run.tokenizer))
    logger = logging.getLogger("langmlm.training")
    logger.setLevel(logging.INFO)
    logger.addHandler(hook)
    hook.pacer.begin()
    task.train()


if __name__ == "__main__":
    serve({"prepare": prepare, "train": train})
