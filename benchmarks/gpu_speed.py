"""Compare the training speed of langmlm with that of the compiled Trainer, on one GPU and synthetic tokens.

    python benchmarks/gpu_speed.py --seconds 290

langmlm runs with its Triton kernel and with its fallback, FlashAttention. Every contender is a process of its own. The
contenders of a wave are set up side by side; then they take turns, so that only one trains at a time. Some of them are
profiled at the end. No text and no network are needed. Results go to `results/gpu_speed.json`, unless `--out` names
another file. `--smoke` tries every code path on a CPU with a tiny model in about a minute; it only prints its results,
which mean nothing, unless there is an `--out`.
"""

import argparse
import json
import logging
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu_speed.json"
BEGIN = time.monotonic()
BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PURPOSES = [  # Patterns of kernel names in lower case; the first match wins
    ("attention", r"flash|fmha|mem_efficient|^_forward|^_grad_query|^_grad_key|_attn_"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|_xmma_|ampere_.*_s\d+|triton_mm|triton_tem|splitk"),
    ("optimizer and gradient norm", r"adam|multi_tensor|foreach|lpnorm|l2norm"),
    ("copies and zeroing", r"memcpy|memset|copy_kernel|fillfunctor"),
    ("loss and head", r"softmax|cross_entropy|nll|scatter|gather"),
    ("layer norm, dropout, residual", r"layer_norm|dropout|rsqrt"),
    ("gelu", r"gelu|erf|tanh"),
    ("embedding", r"embedding|radixsort|devicesort|krn_partial|compute_grad_weight|sum_and_scatter|unique|index"),
    ("reductions (bias gradients)", r"triton_red|triton_per|reduce_kernel|sum"),
]


# --- Synthetic tokens


def make_data(folder: Path, smoke: bool) -> dict:
    "Write a tokenizer and datasets of full rows and of short lines."
    import datasets
    import numpy as np
    import pyarrow as pa
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    vocab_size = 600 if smoke else 50_265
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    words += [f"Ġw{number}" for number in range(vocab_size - len(words) - 1)] + ["<mask>"]
    tokenizer = RobertaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    assert len(tokenizer) == vocab_size and tokenizer.mask_token_id == vocab_size - 1, len(tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    frequency = 1 / (np.arange(vocab_size - 6) + 2.7)  # Zipf's law
    cumulative = np.cumsum(frequency / frequency.sum())

    def write(name: str, lengths: np.ndarray, mask: bool = False) -> None:
        ends = np.cumsum(lengths)
        ids = (5 + np.searchsorted(cumulative, rng.random(ends[-1]))).clip(5, vocab_size - 2).astype(np.int32)
        ids[ends - lengths], ids[ends - 1] = 0, 2
        offsets = pa.array(np.append(0, ends).astype(np.int32))
        special = np.isin(ids, [0, 2]).astype(np.int8)
        columns = {"input_ids": ids} | ({"special_tokens_mask": special} if mask else {})
        columns |= {"attention_mask": np.ones(len(ids), np.int8)} if mask else {}
        table = pa.table({key: pa.ListArray.from_arrays(offsets, pa.array(values)) for key, values in columns.items()})
        datasets.Dataset(table).save_to_disk(folder / name)

    tokens = 20_000 if smoke else 4_000_000
    long, short = (64, 32) if smoke else (512, 128)
    drawn = np.round(rng.lognormal(np.log(23) - 0.18, 0.6, tokens // 23)).astype(np.int64)
    write("full", np.full(tokens // long, long))
    write("rows", np.full(tokens // long, long), mask=True)
    write("rows128", np.full(tokens // short, short), mask=True)
    for name, most in (("lines512", long), ("lines128", short)):
        write(name, np.append(drawn.clip(3, most), most))  # One line has the maximum length, which sets the budget
    return {"vocab_size": vocab_size, "long": long, "short": short, "mean": float(drawn.clip(3, long).mean())}


# --- Contenders, each in a process of its own


class Paced:
    "Cuts a run into windows of steps: one untimed, one timed, then it waits for the next command."

    def __init__(self, job: dict, count_tokens):
        import torch

        self.torch, self.job, self.count_tokens = torch, job, count_tokens
        self.on_gpu, self.profiler = torch.cuda.is_available(), None
        self.lead_in, self.began, self.first = False, 0.0, 0  # Of the window

    def send(self, **message) -> None:
        print("@" + json.dumps(message), file=sys.__stdout__, flush=True)

    def synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def edge(self, steps: int) -> None:
        "Call this after every window, with the number of steps done."
        self.synchronize()
        if self.lead_in:  # The timed window begins
            self.lead_in, self.first = False, steps
            if self.profiler:
                self.profiler.__enter__()
            self.began = time.perf_counter()
            return
        if self.began:
            seconds = time.perf_counter() - self.began
            if self.profiler:
                self.profiler.__exit__(None, None, None)
                self.send(profile=time_by_purpose(self.profiler, steps - self.first))
            else:
                self.send(seconds=seconds, steps=steps - self.first, tokens=self.count_tokens(self.first, steps))
        else:
            memory = self.torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else 0
            self.send(ready=round(time.monotonic() - self.job["spawned"], 1), peak_gb=round(memory, 1))
        command = sys.stdin.readline().strip()
        if command not in ("round", "profile"):
            sys.stdout.flush()
            os._exit(0)
        activity = self.torch.profiler.ProfilerActivity
        activities = [activity.CUDA if self.on_gpu else activity.CPU]
        self.profiler = self.torch.profiler.profile(activities=activities) if command == "profile" else None
        self.lead_in = True


def time_by_purpose(profiler, steps: int) -> dict:
    "Return the milliseconds per step that kernels of each purpose take."
    purposes = Counter()
    for event in profiler.key_averages():
        name = event.key
        if name.startswith("triton_poi") and not re.search("dropout|layer_norm|gelu|erf", name):
            purpose = "other element-wise work"
        else:
            purpose = next((label for label, pattern in PURPOSES if re.search(pattern, name.lower())), "other")
        purposes[purpose] += (getattr(event, "self_device_time_total", 0) or 0) / 1e3 / steps
    milliseconds = {purpose: round(value, 3) for purpose, value in purposes.most_common() if value}
    return {"milliseconds": milliseconds, "total": round(sum(purposes.values()), 3)}


def run_langmlm(job: dict) -> None:
    "Train with langmlm, in windows."
    import numpy as np

    from langmlm import tasks
    from langmlm.model import triton_attention

    triton_attention._ENABLED = job["kernel"] == "triton"
    config = {
        "output_dir": job["run_folder"], "per_device_train_batch_size": job["batch_size"],
        "fill_batches": True, "gradient_accumulation_steps": 1, "max_steps": 2_000, "logging_steps": job["window"],
        "save_strategy": "no", "bf16": True, "torch_compile": None if job["smoke"] else True, "disable_tqdm": True,
        "on_loss_spike": "ignore", "learning_rate": 1e-4, "warmup_ratio": 0.5,
    }  # fmt: skip
    model = job["model"] | {"max_position_embeddings": job["max_length"] + 2}
    task = tasks.create_mlm(job["tokenizer"], job["dataset"], model, config)

    def count_tokens(first: int, last: int) -> int:
        rows = [np.concatenate(task.loader.plan.batches(step)[1]) for step in range(first, last)]
        return int(task.dataset.lengths[np.concatenate(rows)].sum())

    pacer = Paced(job, count_tokens)

    class Hook(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("step "):
                pacer.edge(task.state.step)

    logger = logging.getLogger("langmlm.train.loop")
    logger.setLevel(logging.INFO)
    logger.addHandler(Hook())
    task.train()


def run_trainer(job: dict) -> None:
    "Train with the Trainer, in windows."
    from datasets import load_from_disk
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        RobertaConfig,
        RobertaForMaskedLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    rows = load_from_disk(job["dataset"])
    if not job["mask"]:
        tokenizer.model_input_names = ["input_ids"]
        rows = rows.remove_columns("attention_mask")
    sizes = {"vocab_size": len(tokenizer), "type_vocab_size": 1, "max_position_embeddings": job["max_length"] + 2}
    config = RobertaConfig(**job["model"], **sizes)
    settings = TrainingArguments(
        output_dir=job["run_folder"], per_device_train_batch_size=job["batch_size"], max_steps=2_000,
        learning_rate=1e-4, bf16=True, use_cpu=job["smoke"], torch_compile=not job["smoke"], optim="adamw_torch_fused",
        dataloader_num_workers=0 if job["smoke"] else 4, dataloader_drop_last=True, logging_steps=100_000,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    pacer = Paced(job, lambda first, last: (last - first) * job["batch_size"] * job["max_length"])

    class Hook(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % job["window"] == 0:
                pacer.edge(state.global_step)

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    Trainer(
        model=RobertaForMaskedLM(config), args=settings, train_dataset=rows, data_collator=collator, callbacks=[Hook()]
    ).train()


class Contender:
    "A child process, and the lines it writes."

    def __init__(self, name: str, job: dict, work: Path):
        self.name, self.lines = name, queue.Queue()
        self.log = work / f"{name}.log"
        job = job | {"run_folder": str(work / "runs" / name), "spawned": time.monotonic()}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log.open("w"), text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("@"):
                self.lines.put(json.loads(line[1:]))
        self.lines.put(None)

    def receive(self, seconds: float) -> dict:
        "Return its next message."
        try:
            message = self.lines.get(timeout=max(1.0, seconds))
        except queue.Empty:
            raise RuntimeError(f"no answer in {seconds:.0f} s; {self.tail()}") from None
        if message is None:
            raise RuntimeError(f"ended: {self.tail()}")
        return message

    def ask(self, command: str, seconds: float) -> dict:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.receive(seconds)

    def tail(self) -> str:
        "Return the end of its log."
        return self.log.read_text(errors="replace")[-1500:]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


# --- Turns


def contenders(sizes: dict, data: Path, smoke: bool) -> list[dict[str, dict]]:
    "Return the waves of contenders, each with its job; a name begins with the workload."
    model, batch = (TINY, 4) if smoke else (BASE, 32)
    common = {"tokenizer": str(data / "tokenizer"), "model": model, "smoke": smoke, "batch_size": batch}

    def langmlm(kernel: str, dataset: str, length: int, window: int) -> dict:
        job = {"kind": "langmlm", "kernel": kernel, "dataset": str(data / dataset), "max_length": length}
        return common | job | {"window": 2 if smoke else window}

    def trainer(dataset: str, length: int, mask: bool, **changes) -> dict:
        job = {"kind": "trainer", "mask": mask, "dataset": str(data / dataset), "max_length": length}
        return common | job | {"window": 2 if smoke else 20} | changes

    long, short = sizes["long"], sizes["short"]
    full = {f"full-rows langmlm {kernel}": langmlm(kernel, "full", long, 20) for kernel in ("triton", "flash")}
    full["full-rows trainer"] = trainer("rows", long, mask=False)
    full["full-rows trainer with attention_mask"] = trainer("rows", long, mask=True)
    lines = {f"short-512 langmlm {kernel}": langmlm(kernel, "lines512", long, 20) for kernel in ("triton", "flash")}
    lines |= {f"short-128 langmlm {kernel}": langmlm(kernel, "lines128", short, 60) for kernel in ("triton", "flash")}
    lines["short-128 trainer, rows of 128, batch 128"] = trainer("rows128", short, mask=False, batch_size=4 * batch)
    return [full, lines]


def run_wave(wave: dict, work: Path, results: dict, write, left, share: float, profiled: list[str]) -> None:
    "Set contenders up side by side, let them take turns, and profile some of them."
    until = left() * (1 - share)  # Seconds that are left when this wave must have ended
    running = {name: Contender(name.replace(" ", "_").replace(",", ""), job, work) for name, job in wave.items()}
    try:
        for name, contender in list(running.items()):
            try:
                results[name] = {**contender.receive(left() - until - 25), "tokens_per_second": None, "rounds": []}
            except RuntimeError as error:
                results[name] = {"failed": str(error)}
                running.pop(name).stop()
            write(name)
        for number in range(7):
            for name, contender in list(running.items()):
                if number >= 3 and left() - until < 12 + 6 * len(profiled):
                    break
                try:
                    figures = contender.ask("round", 25)
                except (RuntimeError, OSError) as error:
                    results[name]["failed"] = str(error)
                    running.pop(name).stop()
                    continue
                rounds = results[name]["rounds"]
                rounds.append(round(figures["tokens"] / figures["seconds"]))
                results[name]["tokens_per_second"] = median(rounds)
                results[name]["tokens_per_step"] = figures["tokens"] / figures["steps"]
            write()
        for name in profiled:
            if name in running:
                try:
                    results[name]["profile"] = running[name].ask("profile", 40)["profile"]
                except (RuntimeError, OSError, KeyError) as error:
                    results[name]["profile failed"] = str(error)
                write()
    finally:
        for contender in running.values():
            contender.stop()


def main() -> None:
    "Run both waves, or one contender as a child."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=float, default=290, help="limit for the whole measurement")
    parser.add_argument("--smoke", action="store_true", help="try every code path on a CPU with a tiny model")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # The job of a contender, as JSON
    options = parser.parse_args()
    if options.child:
        job = json.loads(options.child)
        return (run_langmlm if job["kind"] == "langmlm" else run_trainer)(job)

    out = options.out or (None if options.smoke else RESULT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    on_gpu = torch.cuda.is_available()
    results: dict = {}
    stored = json.loads(out.read_text()) if out and out.exists() else {}
    about = {key: stored[key] for key in ("earlier",) if key in stored}  # Of a measurement without other records
    about |= {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }

    def left() -> float:
        return options.seconds - (time.monotonic() - BEGIN)

    def write(name: str | None = None) -> None:
        workloads: dict = {}
        for key, figures in results.items():
            workload, _, contender = key.partition(" ")
            workloads.setdefault(workload, {})[contender] = figures
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(about | {"workloads": workloads}, indent=1) + "\n")
        if name:
            print(f"{time.monotonic() - BEGIN:.0f} s: {name}: {json.dumps(results[name])[:600]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = make_data(work, options.smoke)
        about["data"] = sizes
        print(f"{time.monotonic() - BEGIN:.0f} s: data", flush=True)
        (work / "runs").mkdir()
        full, lines = contenders(sizes, work, options.smoke)
        if on_gpu and torch.cuda.get_device_properties(0).total_memory < 100e9:  # Both Trainers at once may not fit
            name = "full-rows trainer with attention_mask"
            lines[name] = full.pop(name)
        profiled = ["full-rows langmlm flash", "full-rows langmlm triton"]
        run_wave(full, work, results, write, left, 0.57, profiled)
        if left() < 75:
            lines = {name: job for name, job in lines.items() if not name.endswith("flash")}
        if left() > 45 or options.smoke:
            run_wave(lines, work, results, write, left, 1.0, ["short-512 langmlm triton"] if left() > 110 else [])
    write()
    for name, figures in results.items():
        print(name, figures.get("tokens_per_second"), figures.get("rounds"), figures.get("failed", "")[-800:])
        if "profile" in figures:
            print("   ", json.dumps(figures["profile"]["milliseconds"]))
    print(f"total {time.monotonic() - BEGIN:.0f} s", flush=True)


if __name__ == "__main__":
    main()
