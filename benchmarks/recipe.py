"""Compare `recipe="efficient"` with the defaults, with the Trainer, and with itself minus one ingredient, at equal CPU time.

    python benchmarks/recipe.py --text documents.txt --minutes 10

Every run is one process of one thread, planned for the same CPU time from a few measured steps. The held-out
loss is that of 15% masked tokens for all, on 4% of the documents. Results go to `results/recipe.json` after each run, and
a repeated command only does what is missing. Results of another text or time are not mixed: choose another `--out`.
"""

import argparse
import copy
import json
import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from data import SEED, describe_once, hash_text, read_text, split_documents

RESULT = Path(__file__).parent / "results" / "recipe.json"
VOCABULARY, MAX_LENGTH, HELD_OUT, POINTS = 8_192, 512, 0.04, 8
MODEL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
RECIPE = {"recipe": "efficient"}
CONTENDERS = {  # Name -> options of training_config and model_config; the share of the time that an ablation gets
    "recipe": (RECIPE, {}, 1),
    "defaults": ({}, {}, 1),
    "trainer": (None, {}, 1),
    "defaults at 2e-3, 2 rows a step": (
        {"learning_rate": 2e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}, {}, 1
    ),
    "recipe, a fourth of the time": (RECIPE, {}, 0.25),
    "without initialization from the corpus": (RECIPE, {"initialization": "random"}, 0.25),
    "without mlm_probability 0.3": (RECIPE | {"mlm_probability": 0.15}, {}, 0.25),
    "with dropout": (RECIPE, DROPOUT, 0.25),
    "with the default batch size": (
        RECIPE | {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}, {}, 0.25
    ),
    "with half the learning rate": (RECIPE | {"learning_rate": 7e-4}, {}, 0.25),
    "with twice the learning rate": (RECIPE | {"learning_rate": 2.8e-3}, {}, 0.25),
    "with Muon": (RECIPE | {"optim": "muon"}, {}, 0.25),
}  # fmt: skip


def prepare(work: Path, file: Path, megabytes: float) -> dict:
    "Tokenize the first documents of a shuffled text, with some held out."
    from langmlm import tasks
    from langmlm.data.dataset import open_dataset, unigram_entropy

    documents = split_documents(read_text(file), "long")
    random.Random(SEED).shuffle(documents)
    kept, size = [], 0
    if sum(map(len, documents)) < 100_000:
        raise SystemExit(f"{file} is too small: the text needs 100,000 characters, for a training and a validation split")
    while documents and size < megabytes * 1e6:
        kept.append(documents.pop())
        size += len(kept[-1].encode()) + 1
    (work / "text.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    folders = {"path_to_save_tokenizer": str(work / "tokenizer"), "path_to_save_dataset": str(work / "dataset")}
    options = {"vocab_size": VOCABULARY, "max_length": MAX_LENGTH, "validation_fraction": HELD_OUT}
    tasks.create_tokenizer(str(work / "text.txt"), options | folders).train()
    dataset = open_dataset(folders["path_to_save_dataset"])
    entropy = unigram_entropy(dataset, range(5))
    return {"bytes": size, "documents": len(kept), "tokens": dataset.tokens, "unigram_entropy": entropy}


def cpu_seconds(work: Callable[[], object]) -> float:
    "Return the CPU time that a call takes."
    began = time.process_time()
    work()
    return time.process_time() - began


def make_task(work: Path, config: dict, model: dict, folder: str):
    "Create a task whose evaluations mask 15% of the tokens."
    from langmlm import tasks
    from langmlm.data.masking import masking_rules

    fixed = {"output_dir": folder, "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    fixed |= {"eval_steps": 10**9, "logging_steps": 50}
    task = tasks.create_mlm(str(work / "tokenizer"), str(work / "dataset"), MODEL | model, fixed | config)
    task.validation = replace(task.validation, rules=masking_rules(task.tokenizer, 0.15, SEED))
    return task


def train(work: Path, config: dict, model: dict, seconds: float, folder: str) -> dict:
    "Train for a CPU time; return steps, tokens and the held-out loss over the CPU time of training."
    from langmlm.train.evaluate import evaluate
    from langmlm.train.recipe import tokens_per_step

    trial = make_task(work, config | {"max_steps": 1_000}, model, folder)
    trial.estimate(1)
    per_step, size = cpu_seconds(lambda: trial.estimate(8)) / 9, trial.arithmetic().tokens_per_step
    tokens = seconds / per_step * size
    steps = max(1, round(tokens / (tokens_per_step(tokens) if "recipe" in config else size)))
    task = make_task(work, config | {"max_steps": steps, "eval_steps": max(1, steps // POINTS)}, model, folder)
    evaluation = cpu_seconds(lambda: evaluate(task.module, task.validation, task.accelerator))
    began = time.process_time()
    log = [entry for entry in task.train().log_history if "eval_loss" in entry]
    used, size = time.process_time() - began - evaluation * len(log), task.arithmetic().tokens_per_step
    curve = [[round(entry["step"] * size), round(used * entry["step"] / steps, 1), entry["eval_loss"]] for entry in log]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "mlm_probability", "optim")
    chosen = {name: getattr(task.config, name) for name in names}
    return {"steps": steps, "tokens": round(steps * size), "cpu_seconds": used, "curve": curve, "options": chosen}


def train_with_trainer(work: Path, seconds: float, folder: str) -> dict:
    "Train with the Trainer as in run_mlm.py: concatenated rows, batch size 8, learning rate 5e-5."
    import numpy as np
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    from langmlm.model.roberta import FlatMaskedLM
    from langmlm.train.evaluate import evaluate

    task = make_task(work, {"max_steps": 1}, {}, folder)
    ids = np.concatenate([block for block, _ in task.dataset.blocks()])
    rows = ids[: len(ids) // MAX_LENGTH * MAX_LENGTH].reshape(-1, MAX_LENGTH)
    data = Dataset.from_dict({"input_ids": list(rows)})
    curve, started = [], [0.0]

    class Curve(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if args.max_steps >= POINTS and state.global_step % (args.max_steps // POINTS) == 0:
                used = time.process_time() - started[0]
                loss = evaluate(FlatMaskedLM(copy.deepcopy(model)), task.validation, task.accelerator)["eval_loss"]
                curve.append([state.global_step * 8 * MAX_LENGTH, round(used, 1), loss])
                started[0] = time.process_time() - used

    def run(steps: int) -> float:
        from langmlm.model.roberta import build_model

        model = build_model(task.model.config, SEED)
        model.set_attn_implementation("sdpa")
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-5, use_cpu=True, seed=SEED,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=10**9,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(task.tokenizer, mlm_probability=0.15)
        started[0] = time.process_time()
        Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[Curve()]).train()
        return time.process_time() - started[0]

    run(1)
    steps = max(POINTS, round(seconds / (run(5) / 5)))
    used = run(steps)
    options = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, "mlm_probability": 0.15}
    return {"steps": steps, "tokens": steps * 8 * MAX_LENGTH, "cpu_seconds": used, "curve": curve, "options": options}


def run(work: Path, name: str, seconds: float, connection) -> None:
    "Do one run in a process of its own."
    logging.disable(logging.INFO)
    config, model, share = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        arguments = seconds * share, str(Path(folder) / "run")
        result = train_with_trainer(work, *arguments) if config is None else train(work, config, model, *arguments)
    connection.send(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="text file, documents separated by empty lines")
    parser.add_argument("--describe", default="", help="the text in words, for the page")
    parser.add_argument("--megabytes", type=float, default=10, help="of text, as whole documents")
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time of a run; ablations get a fourth")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "recipe")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results, which may have some")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.work /= hash_text(options.text, options.megabytes)
    options.work.mkdir(parents=True, exist_ok=True)
    text = describe_once(options.work / "text.json", lambda: prepare(options.work, options.text, options.megabytes))
    results = {"text": text | {"description": options.describe}, "minutes": options.minutes, "runs": {}}
    results = json.loads(options.out.read_text()) if options.out.exists() else results
    if not text.items() <= results["text"].items() or results["minutes"] != options.minutes:
        parser.error(f"{options.out} has runs on another text or of another time: choose another --out")
    results |= {"date": str(date.today()), "machine": platform.machine(), "model": MODEL}
    for name in options.contenders:
        if name not in results["runs"]:
            receiver, sender = get_context("spawn").Pipe(duplex=False)
            arguments = options.work, name, options.minutes * 60, sender
            process = get_context("spawn").Process(target=run, args=arguments)
            process.start()
            sender.close()
            results["runs"][name] = receiver.recv()
            process.join()
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        last = results["runs"][name]
        print(f"{name}: {last['tokens']:,} tokens, {last['cpu_seconds']:.0f} s, loss {last['curve'][-1][2]:.3f}", flush=True)


if __name__ == "__main__":
    main()
