"What is compared: peers, models, workloads, and the settings that all of them share."

from dataclasses import dataclass
from typing import Any

Job = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    "How a contender is run."

    environment: str
    script: str
    options: tuple[tuple[str, Any], ...] = ()  # Keys of its jobs that are its own
    note: str = ""  # What is not as its users have it, for the results


PEERS = {
    "langmlm": Peer(
        "langmlm",
        "with_langmlm.py",
        note="adam_beta2=0.999 and adam_epsilon=1e-8, as torch has them, for its defaults 0.98 and 1e-6; on a GPU "
        "torch_compile=True, which is its default for runs longer than these",
    ),
    "langmlm-uncompiled": Peer("langmlm", "with_langmlm.py", (("torch_compile", False),), "as langmlm, not compiled"),
    "trainer-dynamic": Peer("trainer", "with_trainer.py", (("rows", "lines"),), "weight_decay=0.01, as torch has it"),
    "trainer-concatenated": Peer(
        "trainer", "with_trainer.py", (("rows", "concatenated"),), "weight_decay=0.01, as torch has it"
    ),
    "langformers": Peer(
        "langformers",
        "with_langformers.py",
        note="transformers 4, since it does not run with 5; the tokenizer of all; max_steps and save_strategy='no'; "
        "its linear schedule cannot be changed, so for `learning` it is made 100 times as long as the run",
    ),
}


@dataclass(frozen=True)
class Workload:
    "One comparison of speed. Everything in it is the same for all of its contenders."

    text: str  # "short" lines, or "long" documents
    model: str  # One of MODELS
    max_length: int
    batch_size: int  # Rows; langmlm takes as many tokens as they can hold
    contenders: tuple[str, ...]  # Peer and precision


# Values that RobertaConfig and langmlm would choose differently are given to both.
COMMON_MODEL = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODELS = {
    "small": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
VOCABULARIES = {"small": 16_384, "base": 50_265}
TINY_VOCABULARIES = {"small": 500, "base": 600}

# The defaults of torch.optim.AdamW, given to those whose defaults are others; Langformers uses them on all weights.
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
    "Names of contenders; Langformers is fp32 as its page sets it up, unless there is only one precision to run in."
    return tuple(
        f"{peer}-{precision}"
        for peer in peers
        for precision in (("fp32",) if peer == "langformers" and len(precisions) > 1 else precisions)
    )


def speed_workloads(device: str, quick: bool) -> dict[str, Workload]:
    "The comparisons of speed on a device."
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
        full = in_precisions(("langmlm", "langmlm-uncompiled", "trainer-concatenated"), ("bf16",))
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
    "The job of a contender that trains; `place` names tokenizer, dataset and run folder."
    architecture = COMMON_MODEL | model | {"max_position_embeddings": max_length + 2}
    job = {"do": "train", **TRAINING, "model": architecture, "max_length": max_length, **place}
    return job | dict(PEERS[peer].options) | changes
