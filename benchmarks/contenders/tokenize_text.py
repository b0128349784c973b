"""Tokenize a text, once for every round: with langmlm, with the bare tokenizer, or with `map` of datasets.

langmlm reads the file and writes a dataset. The bare tokenizer gets the documents in memory, in batches of 1,000, uses
its own threads on all cores, and its result is dropped. `map` of `datasets` starts from a file that is already loaded
(not timed), uses one process per core, and writes its own file.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pacing import Channel, Stop, bytes_on_disk, serve

DOCUMENTS_PER_BATCH = 1_000


def with_langmlm(job: dict) -> tuple[Callable, Callable]:
    "Text to dataset."
    from langmlm.text.corpus import open_corpus
    from langmlm.tokens.shards import write_dataset
    from langmlm.tokens.tokenizer import TokenizerConfig, load_tokenizer

    tokenizer, folder = load_tokenizer(job["tokenizer"]), Path(job["scratch"]) / "dataset"
    config = TokenizerConfig(max_length=job["max_length"], path_to_save_dataset=folder)

    def run(text: str) -> dict:
        return write_dataset(open_corpus(text), tokenizer, config)

    def result(made: dict) -> dict:
        figures = {"tokens": made["tokens"], "bytes": bytes_on_disk(str(folder))}
        shutil.rmtree(folder)
        return figures

    return run, result


def bare(job: dict) -> tuple[Callable, Callable]:
    "Documents to ids, which are dropped."
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(job["tokenizer"]) / "tokenizer.json"))
    tokenizer.no_truncation(), tokenizer.no_padding()
    texts = {}
    for text in (job["text"], job["warm_up_text"]):
        texts[text] = [line for line in Path(text).read_text(encoding="utf-8").split("\n") if line.strip()]

    def run(text: str) -> None:
        for start in range(0, len(texts[text]), DOCUMENTS_PER_BATCH):
            tokenizer.encode_batch_fast(texts[text][start : start + DOCUMENTS_PER_BATCH], add_special_tokens=False)

    return run, lambda _: {}


def with_datasets(job: dict) -> tuple[Callable, Callable]:
    "Lines to rows of `input_ids`, `attention_mask` and `special_tokens_mask`, of any length, not split."
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    texts = {text: load_dataset("text", data_files=text, split="train") for text in (job["text"], job["warm_up_text"])}

    def run(text: str):
        return texts[text].map(
            lambda batch: tokenizer(batch["text"], return_special_tokens_mask=True),
            batched=True,
            num_proc=os.cpu_count(),
            remove_columns=["text"],
            load_from_cache_file=False,
        )

    def result(rows) -> dict:
        figures = {"tokens": sum(len(chunk.flatten()) for chunk in rows.data.column("input_ids").chunks)}
        folder = Path(job["scratch"]) / "rows"
        rows.save_to_disk(folder)
        figures["bytes"] = bytes_on_disk(str(folder))
        shutil.rmtree(folder)
        for file in rows.cache_files:
            os.unlink(file["filename"])
        return figures

    return run, result


def tokenize(channel: Channel, job: dict) -> None:
    "Tokenize a short text untimed, then the text once per round."
    Path(job["scratch"]).mkdir(parents=True, exist_ok=True)
    os.chdir(job["scratch"])
    run, result = {"langmlm": with_langmlm, "bare": bare, "datasets": with_datasets}[job["kind"]](job)
    result(run(job["warm_up_text"]))
    channel.send(ready=True)
    while channel.receive()["do"] != "stop":
        began = time.perf_counter()
        made = run(job["text"])
        seconds = time.perf_counter() - began
        channel.send(round={"seconds": seconds, **result(made)})
    raise Stop


if __name__ == "__main__":
    serve({"tokenize": tokenize})
