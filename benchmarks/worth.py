"""Measure what pretraining is worth: learning curves, and fine-tuning on labeled text, against affordable baselines.

    python benchmarks/worth.py --texts TEXT ... --labeled TABLE ... --preset cpu

Pretrains langmlm, and the Trainer of transformers for the same time and with the same tokens, on raw text without the
validation and test rows of the labeled tables; then fine-tunes the models, the same architecture from scratch, and a
bag of words. Every finished piece is stored in --work, and the same command resumes where it was stopped. Results are
written to results/worth_<preset>.json.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data import is_held_out, read_text, split_documents, write_documents
from measured import measured, probe
from processes import HERE, Contender, Place, once
from run import rounded
from workloads import PEERS, train_job

SEED = 42
POINTS = 12  # Of a learning curve
TYPICAL_STEPS = 1_000  # Of the run whose speed is measured; a recipe chooses the size of a step by them
SEEDS = (0, 1, 2)  # Of the fine-tuning
CONTENDERS = ("langmlm", "trainer-same-time", "trainer-same-tokens")
SENTENCES = (  # Not in the texts
    "The government of the United <mask> has decided.",
    "This package contains the documentation and the <mask> files.",
    "A library for reading and <mask> images.",
    "The captain looked at the <mask> and said nothing.",
    "They voted <mask> the law.",
    "It is a simple tool <mask> in Python.",
)


@dataclass(frozen=True)
class Preset:
    "Sizes and budgets."

    model: dict
    vocab_size: int
    max_length: int
    batch_size: int  # Rows of max_length in a step of any contender, or as many tokens
    learning_rate: float  # Of all contenders
    minutes: float | None  # Of langmlm's pretraining; None: `tokens` decide
    tokens: int | None
    megabytes: int | None  # Of raw text, as a sample of documents; None: all
    train_examples: int  # Of a fine-tuning
    test_examples: int  # At most; half as many for validation
    precision: str
    device: str
    held_out_documents: int = 2_000


PRESETS = {
    "cpu": Preset(
        {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        vocab_size=8_192, max_length=128, batch_size=16, learning_rate=1e-3, minutes=10, tokens=None, megabytes=10,
        train_examples=2_000, test_examples=2_000, precision="fp32", device="cpu", held_out_documents=500,
    ),
    "gpu": Preset(
        {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
        vocab_size=20_000, max_length=256, batch_size=64, learning_rate=1e-3, minutes=None, tokens=60_000_000,
        megabytes=None, train_examples=20_000, test_examples=6_000, precision="bf16", device="cuda",
    ),
    "smoke": Preset(
        {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        vocab_size=600, max_length=32, batch_size=8, learning_rate=1e-3, minutes=None, tokens=10_000, megabytes=1,
        train_examples=60, test_examples=60, precision="fp32", device="cpu", held_out_documents=50,
    ),
}  # fmt: skip


def name_and_value(text: str) -> tuple[str, Any]:
    "Read an option and its value in JSON."
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} has no value in JSON, as 'optim=\"muon\"' has") from error


def read_arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description="Measure what pretraining is worth, and write the results.")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="raw text (.txt or .xz)")
    parser.add_argument("--labeled", type=Path, nargs="+", required=True, help="CSV tables: split, label, text")
    parser.add_argument("--tagged", type=Path, nargs="*", default=[], help="words and tags, one pair per line")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="4 x 256 on a CPU, 8 x 512 on a GPU, or a trial of all code"
    )
    parser.add_argument("--minutes", type=float, help="of langmlm's pretraining, instead of the preset's budget")
    parser.add_argument("--megabytes", type=int, help="of raw text, instead of the preset's sample")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of all pretraining, instead of the preset's")
    parser.add_argument("--until", choices=CONTENDERS, default=CONTENDERS[-1], help="last model to pretrain, in this order")
    parser.add_argument("--finetune", nargs="+", help="models to fine-tune, such as langmlm; default: all")
    parser.add_argument("--train-examples", type=int, help="of a fine-tuning, instead of the preset's number")
    parser.add_argument(
        "--option", action="append", default=[], type=name_and_value, metavar="NAME=JSON", help="for langmlm's training_config"
    )
    parser.add_argument(
        "--model", action="append", default=[], type=name_and_value, metavar="NAME=JSON",
        help="for model_config, over the preset's; the Trainer has no other model_type than roberta, so use --until langmlm",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, help="folder of finished pieces; default: .worth-<preset> beside this file"
    )
    parser.add_argument("--out", type=Path, help="file of results; default: results/worth_<preset>.json")
    arguments = parser.parse_args()
    arguments.work = (arguments.work or HERE / f".worth-{arguments.preset}").resolve()
    arguments.out = arguments.out or HERE / "results" / f"worth_{arguments.preset}.json"
    return arguments


class Pieces:
    "Results of finished work by name; a piece whose settings have changed is made again."

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict, make: Callable[[], dict]) -> dict:
        "Return the stored result, or make and store it."
        file, settings = self.folder / f"{name}.json", json.loads(json.dumps(settings, default=str))
        if file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                print(f"{name}: stored", flush=True)
                return stored["result"]
        print(f"{name}: running", flush=True)
        before = os.getloadavg()[0]
        result = make() | {"load_average": [before, os.getloadavg()[0]]}  # Above the number of cores: times mean little
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings, "result": result}, indent=1), encoding="utf-8")
        partial.replace(file)
        return json.loads(json.dumps(result))


def main() -> None:
    "Make all pieces, and write the results after each of them."
    logging.basicConfig(format="    %(message)s", stream=sys.stdout)
    logging.getLogger("langmlm.probe").setLevel(logging.INFO)
    arguments = read_arguments()
    preset = PRESETS[arguments.preset]
    if arguments.minutes:
        preset = replace(preset, minutes=arguments.minutes, tokens=None)
    given = {name: getattr(arguments, name) for name in ("megabytes", "train_examples", "precision")}
    preset = replace(preset, **{name: value for name, value in given.items() if value})
    options, model = dict(arguments.option), dict(arguments.model)
    preset = replace(preset, model=preset.model | model)
    pieces = Pieces(arguments.work / "pieces")
    place = Place(dict.fromkeys(("langmlm", "trainer"), Path(sys.executable)), arguments.work)
    results = {"measured": measured(place, probe(place)), "settings": asdict(preset) | {"options": options}}
    prepared = prepare(arguments, preset, place, pieces)
    results |= {"prepared": prepared, "pretraining": {}, "finetuning": {}}
    for name, result in pretrain_all(preset, options, prepared, place, pieces):
        results["pretraining"][name] = result
        write(arguments.out, results)
        if name == arguments.until:
            break
    results["filled_masks"] = fill_all(results["pretraining"], pieces)
    write(arguments.out, results)
    tuned = {name: made for name, made in results["pretraining"].items() if name in (arguments.finetune or [name])}
    for file, finetune_models in [(file, tag_all) for file in arguments.tagged] + [
        (table, finetune_all) for table in arguments.labeled
    ]:
        for name, result in finetune_models(file, preset, tuned, pieces):
            results["finetuning"].setdefault(set_name(file), {})[name] = result
            write(arguments.out, results)
    print(summary(results), flush=True)


def write(file: Path, results: dict) -> None:
    "Replace the file of results."
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(rounded(without_paths(results)), indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def without_paths(value):
    "Leave out the folders of this machine."
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_paths(part)
        for key, part in value.items()
        if not (key in ("path", "model") and isinstance(part, str))
    }


# Texts


def set_name(table: Path) -> str:
    "Name of a labeled set."
    return table.name.split(".")[0]


def read_table(table: Path) -> dict:
    "Return the rows of a labeled table by split: train, dev, test."
    import pandas as pd

    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows["split"] = rows["split"].replace({"validation": "dev", "valid": "dev"})
    return {split: part[["text", "label"]].reset_index(drop=True) for split, part in rows.groupby("split")}


def normalized(text: str) -> str:
    "Text with single spaces, on one line."
    return " ".join(text.split())


def collect_documents(texts: list[Path], tables: list[Path]) -> tuple[list[str], dict]:
    "Return documents of the texts and training rows of the tables, without validation and test rows, in random order."
    splits = [read_table(table) for table in tables]
    forbidden = {normalized(text) for parts in splits for name in ("dev", "test") for text in parts[name].text}
    found = [normalized(document) for file in texts for document in split_documents(read_text(file), "long")]
    found += [normalized(text) for parts in splits for text in parts["train"].text]
    documents = sorted({document for document in found if document} - forbidden)
    random.Random(SEED).shuffle(documents)
    return documents, {"removed_test_rows": len(forbidden & set(found)), "documents": len(documents)}


def prepare(arguments: argparse.Namespace, preset: Preset, place: Place, pieces: Pieces) -> dict:
    "Write training text and held-out text, train the tokenizer, and make both datasets."
    work = arguments.work
    text, held_out, tokenizer = work / "train.txt", work / "held_out.txt", work / "tokenizer"
    sources = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in arguments.texts + arguments.labeled
    }

    def make() -> dict:
        for path in (tokenizer, work / "datasets"):
            shutil.rmtree(path, ignore_errors=True)
        documents, counts = collect_documents(arguments.texts, arguments.labeled)
        train, size = [], 0
        for document in documents:
            if not is_held_out(document) and size < (preset.megabytes or 1e9) * 1e6:
                train.append(document)
                size += len(document.encode()) + 1
        write_documents(text, train)
        write_documents(
            held_out, [document for document in documents if is_held_out(document)][: preset.held_out_documents]
        )
        job = {
            "texts": {"all": str(text)},
            "vocab_size": preset.vocab_size,
            "folders": {preset.max_length: str(tokenizer)},
        }
        made = once(place, "langmlm", "prepare_text.py", {"do": "make_tokenizer", **job})
        datasets = {peer: make_dataset(peer, text, tokenizer, preset, place) for peer in ("langmlm", trainer(preset))}
        loss = unigram_loss(Path(datasets["langmlm"]["path"]), tokenizer, held_out, preset.max_length)
        counts |= {"vocabulary": made["tokens_in_vocabulary"]}
        return counts | {"bytes": size, "text": made["texts"]["all"], "datasets": datasets, "unigram_loss": loss}

    keys = ("vocab_size", "max_length", "megabytes", "held_out_documents")
    return pieces.get("prepare", {key: getattr(preset, key) for key in keys} | {"sources": sources}, make)


def trainer(preset: Preset) -> str:
    "The peer with concatenated rows; compiled on a GPU."
    return "trainer-concatenated-compiled" if preset.device == "cuda" else "trainer-concatenated"


def make_dataset(peer: str, text: Path, tokenizer: Path, preset: Preset, place: Place) -> dict:
    "Tokenize the text as a peer does."
    path = place.work / "datasets" / peer / "dataset"
    path.parent.mkdir(parents=True)
    job = {"do": "prepare", "text": str(text), "tokenizer": str(tokenizer), "max_length": preset.max_length}
    job |= {"dataset": str(path), **dict(PEERS[peer].options)}
    made = once(place, PEERS[peer].environment, PEERS[peer].script, job)
    return {"path": str(path), "tokens": made["tokens"], "sequences": made["sequences"]}


def unigram_loss(dataset: Path, tokenizer: Path, held_out: Path, max_length: int) -> float:
    "Return the loss, in nats per held-out token, of a model that knows nothing but the frequencies of tokens."
    import numpy as np
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = load_from_disk(str(dataset))["train"].data.column("input_ids").chunks
    counts = sum(np.bincount(np.asarray(chunk.flatten()), minlength=len(loaded)) for chunk in rows) + 1.0
    counts[loaded.all_special_ids] = 0
    lines = held_out.read_text(encoding="utf-8").splitlines()
    ids = np.concatenate(loaded(lines, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"])
    return float(-np.log(counts[ids.astype(int)] / counts.sum()).mean())


# Pretraining


def pretrain_all(preset: Preset, options: dict, prepared: dict, place: Place, pieces: Pieces):
    "Yield the contenders of pretraining, by name."
    rows = preset.batch_size * preset.max_length

    def make(name: str, peer: str, steps: int, changes: dict) -> dict:
        keys = ("model", "batch_size", "learning_rate", "precision")
        settings = {key: getattr(preset, key) for key in keys} | {"steps": steps, "prepared": prepared, **changes}
        return pieces.get(
            f"pretrain-{name}", settings, lambda: pretrain(name, peer, preset, steps, prepared, place, changes)
        )

    def speed(peer: str, changes: dict) -> dict:
        settings = {key: getattr(preset, key) for key in ("model", "batch_size", "precision")} | changes
        return pieces.get(f"speed-{peer}", settings, lambda: measure_speed(peer, preset, prepared, place, changes))

    changes, other = {"options": options}, trainer(preset)
    steps = whole_points(count_steps(preset, speed("langmlm", changes), bool(options.get("recipe"))))
    yield "langmlm", (own := make("langmlm", "langmlm", steps, changes))
    few = speed(other, {})
    steps = whole_points(few["steps"] * own["seconds"] / few["seconds"])
    yield "trainer-same-time", make("trainer-same-time", other, steps, {})
    yield "trainer-same-tokens", make("trainer-same-tokens", other, whole_points(own["tokens"] / rows), {})


def count_steps(preset: Preset, speed: dict, by_recipe: bool) -> float:
    "Return the steps of a budget of time or tokens; a recipe makes the steps of a longer run larger."
    from langmlm.train.recipe import tokens_per_step

    tokens = preset.minutes * 60 * speed["tokens"] / speed["seconds"] if preset.minutes else preset.tokens
    return tokens / (tokens_per_step(tokens) if by_recipe else speed["tokens"] / speed["steps"])


def whole_points(steps: float) -> int:
    "Round steps to a multiple of the points of a curve."
    return max(1, round(steps / POINTS)) * POINTS


def training_job(name: str, peer: str, preset: Preset, steps: int, prepared: dict, place: Place, changes: dict) -> dict:
    "Return the job of a contender: linear decay to zero after a warm-up of 5%."
    folder = place.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    places = {"tokenizer": str(place.work / "tokenizer"), "dataset": prepared["datasets"][peer]["path"]}
    return train_job(
        peer, places, preset.model | {"vocab_size": prepared["vocabulary"]}, preset.max_length,
        device=preset.device, precision=preset.precision, batch_size=preset.batch_size, max_steps=steps,
        learning_rate=preset.learning_rate, warmup_steps=max(1, steps // 20), warm_up_steps=0,
        logging_steps=max(1, steps // POINTS), run_folder=str(folder), **changes,
    )  # fmt: skip


def measure_speed(peer: str, preset: Preset, prepared: dict, place: Place, changes: dict) -> dict:
    "Return steps, tokens and seconds of a short run."
    steps = 2 * POINTS
    job = training_job("speed", peer, preset, TYPICAL_STEPS, prepared, place, changes) | {"logging_steps": steps}
    with Contender(place, PEERS[peer].environment, PEERS[peer].script, job) as contender:
        contender.receive()
        contender.ask(do="round", steps=steps)
        return contender.ask(do="round", steps=steps)["round"]


def pretrain(name: str, peer: str, preset: Preset, steps: int, prepared: dict, place: Place, changes: dict) -> dict:
    "Train, measure the held-out loss at every point of the curve, and keep the last model."
    job, folder = training_job(name, peer, preset, steps, prepared, place, changes), place.work / "models" / name
    judge_job = {
        "do": "judge", "tokenizer": str(place.work / "tokenizer"), "text": str(place.work / "held_out.txt"),
        "max_length": preset.max_length, "mlm_probability": 0.15, "seed": 1, "device": preset.device,
    }  # fmt: skip
    curve = []
    with Contender(place, "trainer", "judge.py", judge_job) as judge:
        judge.receive()
        with Contender(place, PEERS[peer].environment, PEERS[peer].script, job) as contender:
            contender.receive()
            for _ in range(POINTS):
                done = contender.ask(do="round", steps=steps // POINTS)["round"]
                shutil.rmtree(folder, ignore_errors=True)
                contender.ask(do="save", folder=str(folder))
                loss = judge.ask(do="judge", folder=str(folder))["loss"]
                curve.append({"tokens": done["all_tokens"], "seconds": done["all_seconds"], "loss": loss})
                print(f"    {curve[-1]['tokens']:,} tokens, {curve[-1]['seconds']:,.0f} s: loss {loss:.3f}", flush=True)
            contender.ask(do="stop")
    for file in (place.work / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return {"model": str(folder), "steps": steps, **curve[-1], "curve": curve}


# Fine-tuning


def finetune_all(table: Path, preset: Preset, pretraining: dict, pieces: Pieces):
    "Yield the scores of every pretrained model; those of langmlm include the baselines."
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    for name, made in pretraining.items():
        baselines = ["bag of words", "from scratch", "majority class"] if name == "langmlm" else []
        settings = {"made": made, "train": preset.train_examples, "test": preset.test_examples, "table": digest}
        result = pieces.get(
            f"finetune-{set_name(table)}-{name}", settings, lambda: finetune(table, preset, made["model"], baselines)
        )
        yield name, result


def finetune(table: Path, preset: Preset, model: str, baselines: list[str]) -> dict:
    "Fine-tune with three seeds; the development split decides on the learning rate."
    from langmlm.probe import evaluate

    splits = read_table(table)
    limits = {"dev": preset.test_examples // 2, "test": preset.test_examples}
    small = {
        name: splits[name].sample(min(limit, len(splits[name])), random_state=SEED) for name, limit in limits.items()
    }
    evaluation = evaluate(
        model,
        splits["train"],
        test_data=small["test"],
        validation_data=small["dev"],
        seeds=SEEDS,
        max_train_examples=preset.train_examples,
        baselines=baselines,
    )
    print(evaluation, flush=True)
    return asdict(evaluation) | {"verdict": evaluation.verdict}


def tag_all(file: Path, preset: Preset, pretraining: dict, pieces: Pieces):
    "Yield the scores of every pretrained model as a tagger; those of langmlm include the baselines."
    from tagging import evaluate_tagger

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for name, made in pretraining.items():
        sizes = preset.train_examples, preset.test_examples
        arguments = (file, made["model"], *sizes, SEEDS, name == "langmlm", preset.device)
        settings = {"made": made, "sizes": sizes, "file": digest}
        yield (
            name,
            pieces.get(f"tag-{set_name(file)}-{name}", settings, lambda: {"scores": evaluate_tagger(*arguments)}),
        )


def fill_all(pretraining: dict, pieces: Pieces) -> dict:
    "Return what every model predicts for the masks of some sentences."
    from transformers import pipeline

    def fill(model: str) -> dict:
        predict = pipeline("fill-mask", model=model, top_k=5)
        found = {text: predict(text) for text in SENTENCES}
        return {text: [(entry["token_str"], entry["score"]) for entry in entries] for text, entries in found.items()}

    settings = {"sentences": SENTENCES}
    return {
        name: pieces.get(f"masks-{name}", settings | {"made": made}, lambda: {"masks": fill(made["model"])})["masks"]
        for name, made in pretraining.items()
    }


def summary(results: dict) -> str:
    "The results in a few lines."
    lines = [f"unigram loss {results['prepared']['unigram_loss']:.3f}"]
    for name, made in results["pretraining"].items():
        lines.append(f"{name}: {made['tokens']:,} tokens in {made['seconds']:,.0f} s, held-out loss {made['loss']:.3f}")
    for table, models in results["finetuning"].items():
        for name, result in models.items():
            for contender, runs in result["scores"].items():
                accuracies = [run["accuracy"] for run in runs]
                shown = name if contender == "the model" else contender
                low, mean, high = min(accuracies), sum(accuracies) / len(accuracies), max(accuracies)
                lines.append(f"{table}, {shown}: accuracy {mean:.3f} ({low:.3f} to {high:.3f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
