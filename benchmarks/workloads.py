"Peers, models, workloads, and the settings that all of them share."

from dataclasses import dataclass
from typing import Any

Job = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    "How to run a contender."

    environment: str
    script: str
    options: tuple[tuple[str, Any], ...] = ()  # Entries of its jobs that other peers do not have
    note: str = ""  # Differences from what its users run, for the results


PEERS = {
    "langmlm": Peer(
        "langmlm",
        "with_langmlm.py",
        note="adam_beta2=0.999 and adam_epsilon=1e-8, the defaults of torch, instead of its own 0.98 and 1e-6; on a GPU "
        "torch_compile=True, its default for longer runs; fill_batches=True, which is not its default: a step has up to "
        "five times as many tokens as by default, and learns less from each",
    ),
    "langmlm-uncompiled": Peer("langmlm", "with_langmlm.py", (("torch_compile", False),), "like langmlm, not compiled"),
    "trainer-dynamic": Peer(
        "trainer", "with_trainer.py", (("rows", "lines"),), "weight_decay=0.01, the default of torch"
    ),
    "trainer-concatenated": Peer(
        "trainer", "with_trainer.py", (("rows", "concatenated"),), "weight_decay=0.01, the default of torch"
    ),
    "trainer-concatenated-compiled": Peer(
        "trainer",
        "with_trainer.py",
        (("rows", "concatenated"), ("torch_compile", True)),
        "like trainer-concatenated, with torch_compile=True",
    ),
    "langformers": Peer(
        "langformers",
        "with_langformers.py",
        note="transformers 4, since it does not run with 5; the shared tokenizer; max_steps and save_strategy='no'; "
        "its linear schedule cannot be changed, so for `learning` it is 100 times as long as the run",
    ),
}


@dataclass(frozen=True)
class Workload:
    "One speed comparison. All contenders share its settings."

    text: str  # "short" lines, or "long" documents
    model: str  # One of MODELS
    max_length: int
    batch_size: int  # Rows; for langmlm a budget of as many tokens as they can hold
    contenders: tuple[str, ...]  # Peer and precision


# RobertaConfig and langmlm have different defaults for these, so both get them.
COMMON_MODEL = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODELS = {
    "small": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
VOCABULARIES = {"small": 16_384, "base": 50_265}
TINY_VOCABULARIES = {"small": 500, "base": 600}

# The defaults of torch.optim.AdamW, passed to contenders with other defaults; Langformers uses them for all weights.
ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01}
TRAINING = {
    "learning_rate": 2e-4,
    "mlm_probability": 0.15,
    "seed": 42,
    "adamw": ADAMW,
    "lr_scheduler_type": "linear",
    "warmup_steps": 100,
    "packing": True,
}

BOTH = ("fp32", "bf16")


def in_precisions(peers: tuple[str, ...], precisions: tuple[str, ...]) -> tuple[str, ...]:
    "Return names of contenders; Langformers runs in fp32, as on its page, unless there is only one precision."
    return tuple(
        f"{peer}-{precision}"
        for peer in peers
        for precision in (("fp32",) if peer == "langformers" and len(precisions) > 1 else precisions)
    )


def speed_workloads(device: str, quick: bool) -> dict[str, Workload]:
    "Return the speed comparisons for a device."
    if quick:
        stock = ("trainer-dynamic-fp32", "trainer-concatenated-bf16")
        return {
            "short-512": Workload(
                "short", "small", 32, 8, ("langmlm-fp32", "langmlm-bf16", *stock, "langformers-fp32")
            ),
            "short-128": Workload("short", "small", 32, 8, ("langmlm-fp32",)),
            "full-rows": Workload("long", "small", 64, 8, ("langmlm-fp32",)),
            "full-rows-base": Workload("long", "base", 64, 4, ("trainer-concatenated-bf16",)),
        }
    if device == "cuda":
        lines = in_precisions(("langmlm", "trainer-dynamic", "langformers"), ("bf16",))
        full = in_precisions(
            ("langmlm", "langmlm-uncompiled", "trainer-concatenated", "trainer-concatenated-compiled"), ("bf16",)
        )
        return {
            "full-rows": Workload("long", "base", 512, 32, full),
            "short-128": Workload("short", "base", 128, 32, lines),
            "short-512": Workload("short", "base", 512, 32, lines),
        }
    contenders = in_precisions(("langmlm", "trainer-dynamic", "trainer-concatenated", "langformers"), BOTH)
    full = in_precisions(("langmlm", "trainer-concatenated"), BOTH)  # At base size each needs several GB
    return {
        "short-512": Workload("short", "small", 512, 32, contenders),
        "short-128": Workload("short", "small", 128, 32, contenders),
        "full-rows": Workload("long", "small", 512, 32, contenders),
        "full-rows-base": Workload("long", "base", 512, 4, full),
    }


def train_job(peer: str, place: Job, model: Job, max_length: int, **changes) -> Job:
    "Return the job of a contender that trains; `place` has the paths of tokenizer, dataset and run folder."
    architecture = COMMON_MODEL | model | {"max_position_embeddings": max_length + 2}
    job = {"do": "train", **TRAINING, "model": architecture, "max_length": max_length, **place}
    return job | dict(PEERS[peer].options) | changes
