"The texts, their tokenizers, and the dataset that each peer makes from them."

import hashlib
import json
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Place, once
from workloads import PEERS

SEED = 42
HELD_OUT_SHARE = 0.05
HELD_OUT_LINES = 2_000  # As many as the judge reads, at most
QUICK_DOCUMENTS = {"short": 600, "long": 12}


def read_text(file: Path) -> str:
    "Read a text file, which may be compressed by xz."
    with (lzma.open if file.suffix == ".xz" else open)(file, "rt", encoding="utf-8") as text:
        return text.read()


def hash_text(*parts: Any) -> str:
    "Return a name for texts and numbers: a `Path` stands for the content of the file."
    content = [part.read_bytes() if isinstance(part, Path) else str(part).encode() for part in parts]
    return hashlib.sha256(b"\n".join(content)).hexdigest()[:12]


def describe_once(file: Path, prepare: Callable[[], dict]) -> dict:
    "Prepare a text once, and return the facts about it, which a JSON file keeps."
    if not file.exists():
        file.write_text(json.dumps(prepare()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def split_documents(text: str, kind: str) -> list[str]:
    "Short: one document per line. Long: the same, or paragraphs separated by empty lines if there are any."
    lines = [line.strip() for line in text.split("\n")]
    if kind == "short" or "" not in lines[:-1]:
        return [line for line in lines if line]
    documents: list[list[str]] = [[]]
    for line in lines:
        if line:
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return [" ".join(paragraphs) for paragraphs in documents if paragraphs]


def is_held_out(document: str) -> bool:
    "Choose documents by hash, so that duplicates are on the same side."
    digest = hashlib.sha256(f"{SEED} {document}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def write_documents(file: Path, documents: list[str]) -> Path:
    "One document per line."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(documents) + "\n", encoding="utf-8")
    return file


@dataclass
class Data:
    "Texts and datasets that all workloads share."

    place: Place
    train: dict[str, Path]  # "short" and "long": one document per line
    held_out: Path  # Short lines
    texts: dict[str, dict]  # Their description in the results
    lengths: tuple[int, ...]  # All values of max_length
    vocabularies: dict[str, int] = field(default_factory=dict)  # Requested vocabulary size by model name
    _made: dict[tuple, dict] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.place.work

    def tokenizer(self, model: str, max_length: int) -> str:
        "Return the tokenizer folder of a model; train the tokenizer on both training texts when it is first needed."
        folders = {length: self.work / "tokenizers" / f"{model}-{length}" for length in self.lengths}
        if not folders[max_length].exists():
            print(f"training the tokenizer of the {model} model", flush=True)
            job = {
                "do": "make_tokenizer",
                "texts": {kind: str(file) for kind, file in self.train.items()},
                "vocab_size": self.vocabularies[model],
                "folders": {length: str(folder) for length, folder in folders.items()},
            }
            made = once(self.place, "langmlm", "prepare_text.py", job)
            for kind, sizes in made["texts"].items():
                self.texts[kind][f"with_{made['tokens_in_vocabulary']}_tokens"] = sizes
        return str(folders[max_length])

    def dataset(self, peer: str, text: str, model: str, max_length: int) -> dict:
        "Return `path`, `tokens`, `sequences` and `bytes` of the dataset that a peer trains on."
        key = (peer, text, model, max_length)
        if key not in self._made:
            path = self.work / "datasets" / "-".join(map(str, key)) / "dataset"
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"tokenizing for {peer} ({text}, {max_length})", flush=True)
            job = {
                "do": "prepare",
                "text": str(self.train[text]),
                "tokenizer": self.tokenizer(model, max_length),
                "dataset": str(path),
                "max_length": max_length,
                **dict(PEERS[peer].options),
            }
            made = once(self.place, PEERS[peer].environment, PEERS[peer].script, job)
            self._made[key] = {"path": str(path), **{name: made[name] for name in ("tokens", "sequences", "bytes")}}
        return self._made[key]

    def dataset_figures(self, *key) -> dict:
        "Describe a dataset for the results."
        made = self.dataset(*key)
        sizes = {name: made[name] for name in ("tokens", "sequences", "bytes")}
        return sizes | {"bytes_per_token": made["bytes"] / made["tokens"]}


def load_data(place: Place, files: dict[str, Path], lengths: tuple[int, ...], vocabularies: dict, quick: bool) -> Data:
    "Read the texts, or create the default ones; split them; write them for the contenders."
    named = {kind: file.name for kind, file in files.items()}
    missing = {kind: place.work / f"docstrings-{kind}.txt" for kind in ("short", "long") if kind not in files}
    if missing:
        everything = {kind: str(place.work / f"docstrings-{kind}.txt") for kind in ("short", "long")}
        once(place, "langmlm", "prepare_text.py", {"do": "default_texts", **everything})
        named |= {kind: "docstrings of Python's standard library" for kind in missing}
    train, texts = {}, {}
    for kind, file in (missing | files).items():
        documents = split_documents(read_text(file), kind)
        if quick:
            documents = random.Random(SEED).sample(documents, QUICK_DOCUMENTS[kind])
        kept = [document for document in documents if not is_held_out(document)]
        train[kind] = write_documents(place.work / "texts" / f"{kind}.txt", kept)
        if kind == "short":
            others = random.Random(SEED).sample(documents, len(documents))
            held_out = [document for document in others if is_held_out(document)][:HELD_OUT_LINES]
            write_documents(place.work / "texts" / "held-out.txt", held_out)
        texts[kind] = {
            "name": named[kind],
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "documents": len(documents),
            "training_documents": len(kept),
            "training_bytes": train[kind].stat().st_size,
        }
    return Data(place, train, place.work / "texts" / "held-out.txt", texts, lengths, vocabularies)
