"""The Trainer of transformers, as its users set it up for masked language modelling.

`rows="lines"`: one line per row, truncated at max_length, padded by the collator to the longest row of the batch.
`rows="concatenated"`: all lines concatenated and split into rows of max_length, as `run_mlm.py` does by default.
`torch_compile=True`: the model is compiled, and incomplete batches at the end of an epoch are dropped, since a new
shape would be compiled again.
"""

from itertools import chain

from datasets import Dataset, load_dataset, load_from_disk
from pacing import Channel, bytes_on_disk, serve
from stock_hooks import StepHook, make_pacer
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
    set_seed,
)


def tokenize_lines(lines: Dataset, tokenizer, max_length: int) -> Dataset:
    "One line per row."
    return lines.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length, return_special_tokens_mask=True),
        batched=True,
        remove_columns=["text"],
    )


def concatenate_rows(lines: Dataset, tokenizer, max_length: int) -> Dataset:
    "Full rows; the remainder of each batch of `map` is dropped."
    whole = lines.map(
        lambda batch: tokenizer(batch["text"], return_special_tokens_mask=True), batched=True, remove_columns=["text"]
    )

    def group(batch: dict) -> dict:
        joined = {name: list(chain.from_iterable(batch[name])) for name in batch}
        length = len(joined["input_ids"]) // max_length * max_length
        return {
            name: [values[start : start + max_length] for start in range(0, length, max_length)]
            for name, values in joined.items()
        }

    return whole.map(group, batched=True)


def prepare(channel: Channel, job: dict) -> None:
    "Tokenize the text."
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    lines = load_dataset("text", data_files=job["text"], split="train")
    make_rows = concatenate_rows if job["rows"] == "concatenated" else tokenize_lines
    rows = make_rows(lines, tokenizer, job["max_length"])
    rows.save_to_disk(job["dataset"])
    tokens = sum(len(chunk.flatten()) for chunk in rows.data.column("input_ids").chunks)
    channel.send(tokens=tokens, sequences=len(rows), bytes=bytes_on_disk(job["dataset"]))


def train(channel: Channel, job: dict) -> None:
    "Train until the runner has seen enough."
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    model = RobertaForMaskedLM(RobertaConfig(**job["model"]))
    settings = TrainingArguments(
        output_dir=job["run_folder"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type=job["lr_scheduler_type"],
        warmup_steps=job["warmup_steps"],
        **job["adamw"],
        max_steps=job["max_steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
        bf16=job["precision"] == "bf16",
        torch_compile=job.get("torch_compile", False),
        dataloader_drop_last=job.get("torch_compile", False),
        use_cpu=job["device"] == "cpu",
    )
    pacer = make_pacer(channel, job, model)
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=load_from_disk(job["dataset"]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=job["mlm_probability"]),
        callbacks=[StepHook(pacer)],
    )
    pacer.begin()
    trainer.train()


if __name__ == "__main__":
    serve({"prepare": prepare, "train": train})
