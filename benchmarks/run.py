"""Benchmark langmlm against its peers: create environments, prepare texts, run all contenders, write the results.

    python benchmarks/run.py --short-lines FILE --long-documents FILE

benchmarks/README.md describes what is measured.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import Data, load_data
from environments import ENVIRONMENTS, REQUIREMENTS, find_pythons
from growth import run_growth
from learning import Course, run_learning
from measured import measured, probe
from memory import run_memory
from processes import HERE, Failure, Place
from speed import Pace, run_speed
from tokenizing import run_tokenizing
from workloads import MODELS, PEERS, TINY, TINY_VOCABULARIES, TRAINING, VOCABULARIES, Workload, speed_workloads

SPEED = ("short-512", "short-128", "full-rows", "full-rows-base")
OTHERS = ("learning", "tokenizing", "memory", "growth")
QUICK = {"rounds": 2, "round_seconds": 0.5, "learning_tokens": 4_000, "learning_seconds": 2.0, "learning_limit": 20.0}
USUAL = {"rounds": 5, "round_seconds": 20.0, "learning_tokens": 600_000, "learning_seconds": 240.0}
USUAL["learning_limit"] = 1_800.0
TOKENIZING_ROUNDS = 3  # Times as many rounds as elsewhere, since they are short


def read_arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description="Measure langmlm and its peers, and write the results.")
    parser.add_argument("--short-lines", type=Path, help="text, one document per line (.txt or .xz)")
    parser.add_argument("--long-documents", type=Path, help="text, documents ended by empty lines, else one per line")
    parser.add_argument(
        "--growth-text", type=Path, action="append", help="text of `growth`, repeatable; default: the short lines"
    )
    parser.add_argument("--workloads", nargs="+", choices=SPEED + OTHERS, help="run only these; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="an existing environment")
    parser.add_argument("--without", action="append", default=[], choices=("trainer", "langformers"), help="leave out")
    parser.add_argument("--rounds", type=int, help="rounds per contender (5)")
    parser.add_argument("--round-seconds", type=float, help="length of a round (20)")
    parser.add_argument("--learning-tokens", type=int, help="real tokens after which losses are compared (600,000)")
    parser.add_argument("--learning-seconds", type=float, help="time after which losses are compared (240)")
    parser.add_argument("--learning-limit", type=float, help="seconds after which a contender is stopped (1,800)")
    parser.add_argument("--work", type=Path, help="folder for intermediate files; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file of results; default: results/<device>.json beside this script")
    parser.add_argument("--quick", action="store_true", help="try every code path in minutes; the results mean nothing")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else USUAL).items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    return arguments


def main() -> int:
    "Run the workloads one after the other, and write results after each."
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that contenders end and temporary files are removed
    with tempfile.TemporaryDirectory(prefix="langmlm-benchmark-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            raise SystemExit("--work must name a folder that is empty or not there yet")
        place = Place(
            find_pythons([name for name in REQUIREMENTS if name not in arguments.without], arguments.python), work
        )
        probes = probe(place)
        device = arguments.device or ("cuda" if probes["langmlm"]["gpu"] else "cpu")
        out = arguments.out or default_out(device, arguments.quick)
        data = prepare(arguments, place, device)
        speed = speed_workloads(device, arguments.quick)
        if device == "cuda":
            make_datasets(data, [speed[name] for name in arguments.workloads or speed if name in speed])
        failed, known = False, (*speed, *OTHERS)
        for name in arguments.workloads or known:
            if name not in known:
                print(f"{name} is no workload on {device}", flush=True)
                continue
            began = time.monotonic()
            print(name, flush=True)
            try:
                result = run_one(name, arguments, data, device, load(out))
            except Failure as failure:
                print(f"{name} has no result: {failure}", flush=True)
                failed = True
                continue
            minutes = round((time.monotonic() - began) / 60, 1)
            note = measured(place, probes) | {"minutes": minutes, "texts": data.texts, "quick": arguments.quick}
            store(out, device, name, {"measured": note, "settings": settings(name, arguments, device), **result})
            print(f"{name}: {minutes} minutes", flush=True)
    print(f"results are in {out}", flush=True)
    return int(failed)


def default_out(device: str, quick: bool) -> Path:
    "Return the file of results; a quick run has another one."
    return ENVIRONMENTS / f"quick-{device}.json" if quick else HERE / "results" / f"{device}.json"


def prepare(arguments: argparse.Namespace, place: Place, device: str) -> Data:
    "Read and split the texts."
    given = {"short": arguments.short_lines, "long": arguments.long_documents}
    files = {kind: file.resolve() for kind, file in given.items() if file}
    lengths = tuple(sorted({workload.max_length for workload in speed_workloads(device, arguments.quick).values()}))
    vocabularies = TINY_VOCABULARIES if arguments.quick else VOCABULARIES
    return load_data(place, files, lengths, vocabularies, arguments.quick)


def make_datasets(data: Data, workloads: list[Workload]) -> None:
    "Create all datasets in parallel, before anything is timed."
    keys = {
        (name.rsplit("-", 1)[0], workload.text, workload.model, workload.max_length)
        for workload in workloads
        for name in workload.contenders
    }
    for model in {workload.model for workload in workloads}:
        data.tokenizer(model, data.lengths[0])
    with ThreadPoolExecutor(max(1, len(keys))) as pool:
        for made in [pool.submit(data.dataset, *key) for key in keys]:
            if isinstance(made.exception(), Failure):
                print(f"  {made.exception()}", flush=True)  # Reported again where the dataset is needed
            else:
                made.result()


def architecture(name: str, quick: bool) -> dict:
    "Return the architecture of a model, with its vocabulary size."
    vocabulary = (TINY_VOCABULARIES if quick else VOCABULARIES)[name]
    return (TINY if quick else MODELS[name]) | {"vocab_size": vocabulary}


def run_one(name: str, arguments: argparse.Namespace, data: Data, device: str, before: dict) -> dict:
    "Run one workload."
    quick, workloads = arguments.quick, speed_workloads(device, arguments.quick)
    if name in workloads:
        model = architecture(workloads[name].model, quick)
        pace = Pace(device, arguments.rounds, arguments.round_seconds)
        return run_speed(workloads[name], data, model, pace)
    small, short = architecture("small", quick), workloads["short-128"]
    if name == "learning":
        course = Course(
            device,
            arguments.learning_tokens,
            arguments.learning_seconds,
            arguments.learning_limit,
            2_000 if quick else 200_000,
            precisions(before, device),
        )
        return run_learning(data, small, short.max_length, course)
    if name == "tokenizing":
        texts = ("short",) if quick else ("short", "long")
        return run_tokenizing(data, texts, "small", short.max_length, TOKENIZING_ROUNDS * arguments.rounds)
    if name == "memory":
        rows = workloads["full-rows"].max_length
        return run_memory(data, "base", architecture("base", quick), rows, device)
    repetitions = 1 if quick else arguments.rounds
    return run_growth(data, arguments.growth_text or [], small, short.max_length, device, repetitions, short.batch_size)


def precisions(before: dict, device: str) -> dict[str, str]:
    "Return the faster precision of each peer on short lines, if it was measured before; else a default."
    chosen = dict.fromkeys(PEERS, "bf16" if device == "cuda" else "fp32")
    best = before.get("workloads", {}).get("short-128", {}).get("best", {})
    for values in best.values():
        for name in values["of"]:
            peer, precision = name.rsplit("-", 1)
            chosen[peer] = precision
    return chosen


def settings(name: str, arguments: argparse.Namespace, device: str) -> dict:
    "Return the settings of a workload."
    numbers = ("rounds", "round_seconds", "learning_tokens", "learning_seconds", "learning_limit")
    shared = {key: getattr(arguments, key) for key in numbers if key.startswith("learning") == (name == "learning")}
    shared |= {"notes": {peer: entry.note for peer, entry in PEERS.items()}}
    workload = speed_workloads(device, arguments.quick).get(name)
    if workload is None:
        return shared | {"model": architecture("base" if name == "memory" else "small", arguments.quick)}
    return {
        **shared,
        "text": workload.text,
        "max_length": workload.max_length,
        "per_device_train_batch_size": workload.batch_size,
        "gradient_accumulation_steps": 1,
        "training": TRAINING,
        "model": architecture(workload.model, arguments.quick),
    }


def load(file: Path) -> dict:
    "Return the results so far."
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def store(file: Path, device: str, name: str, result: dict) -> None:
    "Put the result of a workload into its file, beside those of the others."
    results = load(file) | {"device": device}
    results["workloads"] = results.get("workloads", {}) | {name: result}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def rounded(value):
    "Figures to six digits, which is more than they are good for."
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
