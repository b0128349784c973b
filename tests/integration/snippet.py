"""Run both tasks at a small size, from raw text to fill-mask, twice in a row, in the current folder.

Needs nothing but the installed package. `--without-nbdev` also checks that nbdev is not installed.
"""

import importlib.util
import json
import math
import sys
from itertools import islice
from pathlib import Path

import transformers
from langmlm import tasks
from langmlm.text.corpus import docstrings
from transformers import AutoTokenizer, RobertaForMaskedLM

DOCUMENTS = 400
VOCABULARY = 1_000
MAX_LENGTH = 64
SENTENCE = "Return a new<mask> object."


def write_corpus(path: Path) -> None:
    "Write some of the standard library's docstrings, one paragraph a line."
    lines = list(islice(docstrings(), DOCUMENTS))
    assert len(lines) == DOCUMENTS and not any("\n" in line for line in lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pretrain() -> list[dict]:
    "Train a tokenizer and a model as a user would; return the log of the run."
    tokenizer = tasks.create_tokenizer(
        data_path="data.txt",
        tokenizer_config={"vocab_size": VOCABULARY, "min_frequency": 2, "max_length": MAX_LENGTH},
    )
    tokenizer.train()

    model = tasks.create_mlm(
        tokenizer="tokenizer",
        tokenized_dataset="tokenized_dataset",
        training_config={
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1,
            "save_steps": 5,
            "save_total_limit": 3,
            "logging_steps": 5,
            "learning_rate": 2e-3,
        },
        model_config={
            "vocab_size": VOCABULARY,
            "max_position_embeddings": MAX_LENGTH + 2,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
        },
    )
    return model.train().log_history


def check_log(log_history: list[dict]) -> None:
    "Check that the logged losses are finite and fell."
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    assert len(losses) > 1 and all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0], losses


def check_tokenizer() -> None:
    "Check that the tokenizer folder loads, and that text survives encoding and decoding."
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    assert tokenizer.model_max_length == MAX_LENGTH
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
    text = "Naïve  text, 雪 and 🎈."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def check_model(folder: Path) -> None:
    "Check that a folder of the run loads with stock transformers and fills a mask."
    model, tokenizer = RobertaForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    guesses = transformers.pipeline("fill-mask", model=str(folder))(SENTENCE, top_k=5)
    assert len({guess["token_str"] for guess in guesses}) == 5
    assert all(0 < guess["score"] <= 1 for guess in guesses)


def check_run(folder: Path) -> None:
    "Check that the run folder has checkpoints, a final model, and a log."
    checkpoints = sorted(folder.glob("checkpoint-*"))
    assert 1 <= len(checkpoints) <= 3, checkpoints
    for model_folder in [*checkpoints, folder / "final_model"]:
        check_model(model_folder)
    for state_folder in [*checkpoints, folder]:
        assert json.loads((state_folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def run_folders() -> set[Path]:
    "Return the runs in this folder."
    return {path.parent for path in Path().glob("*/final_model")}


def main() -> None:
    "Run both tasks twice, and check the results of each."
    if "--without-nbdev" in sys.argv:
        assert importlib.util.find_spec("nbdev") is None, "nbdev is installed here"
    transformers.utils.logging.disable_progress_bar()
    write_corpus(Path("data.txt"))
    for _ in range(2):
        earlier = run_folders()
        check_log(pretrain())
        check_tokenizer()
        (new,) = run_folders() - earlier
        check_run(new)
        print(f"{new}: all checks passed")


if __name__ == "__main__":
    main()
