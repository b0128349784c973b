"Compare training time per token and peak memory on a hundredth, a tenth and all of a text."

import random
from pathlib import Path
from statistics import median

from data import SEED, Data, read_text, split_documents, write_documents
from processes import Contender
from rounds import rotated
from summary import is_noisy, spread
from workloads import PEERS, train_job

SIZES = {"x1": 100, "x10": 10, "x100": 1}  # The text divided by this number
STEPS = 20
WARM_UP_STEPS = 5


def run_growth(
    data: Data, files: list[Path], model: dict, max_length: int, device: str, repetitions: int, batch_size: int
) -> dict:
    "Measure every size in a fresh process, in turns, several times."
    texts = make_texts(data, files)
    tokenizer = data.tokenizer("small", max_length)
    jobs = {}
    for size, text in texts.items():
        dataset = make_dataset(data, text, tokenizer, max_length, size)
        jobs[size] = training_job(dataset, tokenizer, model, max_length, device, batch_size)
    raw: dict[str, list[dict]] = {size: [] for size in SIZES}
    for number in range(repetitions):
        for size in rotated(list(SIZES), number):
            figures = measure_once(data, jobs[size] | {"run_folder": str(data.work / f"growth/{size}-{number}")})
            raw[size].append(figures)
            print(f"  {number + 1}: {size}: {figures['microseconds_per_token']:.3f} us per token", flush=True)
    return {"bytes": {size: text.stat().st_size for size, text in texts.items()}, "training": medians(raw)}


def make_texts(data: Data, files: list[Path]) -> dict[str, Path]:
    "Write parts of the text, documents in a seeded order; each part contains the smaller ones."
    documents: list[str] = []
    for file in files or [data.train["short"]]:
        documents += split_documents(read_text(file), "short")
    random.Random(SEED).shuffle(documents)
    return {
        size: write_documents(data.work / "texts" / f"{size}.txt", documents[: max(1, len(documents) // part)])
        for size, part in SIZES.items()
    }


def make_dataset(data: Data, text: Path, tokenizer: str, max_length: int, size: str) -> str:
    "Tokenize a part."
    path = str(data.work / "datasets" / f"growth-{size}")
    job = {"do": "prepare", "text": str(text), "tokenizer": tokenizer, "dataset": path, "max_length": max_length}
    with Contender(data.place, "langmlm", PEERS["langmlm"].script, job) as contender:
        contender.receive()
    return path


def training_job(dataset: str, tokenizer: str, model: dict, max_length: int, device: str, batch_size: int) -> dict:
    "Return the job of a fixed number of steps."
    return train_job(
        "langmlm",
        {"tokenizer": tokenizer, "dataset": dataset},
        model,
        max_length,
        device=device,
        precision="bf16" if device == "cuda" else "fp32",
        batch_size=batch_size,
        warm_up_steps=WARM_UP_STEPS,
        warmup_steps=0,
        logging_steps=WARM_UP_STEPS,
        max_steps=STEPS + 2 * WARM_UP_STEPS,
    )


def measure_once(data: Data, job: dict) -> dict:
    "Train for some steps in one process."
    with Contender(data.place, "langmlm", PEERS["langmlm"].script, job) as contender:
        contender.receive()
        return per_token(contender.ask(do="round", steps=STEPS)["round"], contender.ask(do="stop"))


def per_token(figures: dict, peak: dict) -> dict:
    "Return the results of one measurement."
    microseconds = 1e6 * figures["seconds"] / figures["tokens"]
    return {"microseconds_per_token": microseconds, "tokens": figures["tokens"], **peak}


def medians(measured: dict[str, list[dict]]) -> dict:
    "Medians by size."
    results: dict[str, dict] = {}
    for size, figures in measured.items():
        time = spread([one["microseconds_per_token"] for one in figures])
        memory = median(one["peak_resident"] for one in figures)
        results[size] = {"microseconds_per_token": time, "peak_resident": memory, "rounds": figures}
        if is_noisy(time):
            results[size]["noisy"] = True
    return results
