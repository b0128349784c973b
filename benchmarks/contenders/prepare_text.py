"Prepare a benchmark with langmlm: default texts, the shared tokenizer, the sizes of the texts."

import json
import shutil
from pathlib import Path

import numpy as np
from pacing import Channel, serve
from transformers import PreTrainedTokenizerBase

from langmlm import tasks
from langmlm.text.corpus import docstrings, open_corpus
from langmlm.tokens.encode import encode_documents

WORDS_IN_A_DOCUMENT = 4_000  # Of the default long text: paragraphs of neighboring modules, joined


def default_texts(channel: Channel, job: dict) -> None:
    "Write the docstrings of Python's standard library: one paragraph per line, and joined to long documents."
    paragraphs, documents, words = list(docstrings()), [[]], 0
    for paragraph in paragraphs:
        documents[-1].append(paragraph)
        words += len(paragraph.split())
        if words >= WORDS_IN_A_DOCUMENT:
            documents.append([])
            words = 0
    Path(job["short"]).write_text("\n".join(paragraphs), encoding="utf-8")
    Path(job["long"]).write_text("\n".join(" ".join(document) for document in documents if document), encoding="utf-8")
    channel.send(paragraphs=len(paragraphs))


def make_tokenizer(channel: Channel, job: dict) -> None:
    "Train one tokenizer; save a folder for every max_length, since some contenders read the length from it."
    folders = {int(length): Path(folder) for length, folder in job["folders"].items()}
    first, *others = folders.values()
    scratch = first.parent / "dataset-of-the-tokenizer"
    config = {"vocab_size": job["vocab_size"], "path_to_save_tokenizer": first, "path_to_save_dataset": scratch}
    task = tasks.create_tokenizer(data_path=list(job["texts"].values()), tokenizer_config=config)
    task.train()
    shutil.rmtree(scratch)
    for folder in others:
        shutil.copytree(first, folder)
    for length, folder in folders.items():
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"model_max_length": length}
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    measured = {kind: measure_text(text, task.tokenizer) for kind, text in job["texts"].items()}
    channel.send(tokens_in_vocabulary=len(task.tokenizer), texts=measured)


def measure_text(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    "Count the tokens of the documents of a text, with two special tokens each."
    parts = [lengths for _, lengths in encode_documents(open_corpus(text), tokenizer)]
    lengths = np.concatenate(parts) + 2
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "mean_tokens": round(float(lengths.mean()), 2),
        "median_tokens": float(np.median(lengths)),
        "percentile_95_tokens": float(np.percentile(lengths, 95)),
        "longest_tokens": int(lengths.max()),
    }


if __name__ == "__main__":
    serve({"default_texts": default_texts, "make_tokenizer": make_tokenizer})
