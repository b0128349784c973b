"""The main job, from raw text to a model that fills masks: trained, stopped half-way, resumed, and asked.

The text is what every machine with Python has: the docstrings of the standard library.
"""

import logging
import shutil
from pathlib import Path

from transformers import pipeline

from langmlm import tasks
from langmlm.text.corpus import docstrings
from langmlm.data.dataset import open_dataset, unigram_entropy
from langmlm.tokens.tokenizer import load_tokenizer

FOLDER = Path("demo_run")
SENTENCES = [
    "Return the <mask> of the file.",
    "If the argument is not given, <mask> is used.",
    "Raise a <mask> if the key is not found.",
    "This method returns <mask> if the object is callable.",
    "The optional argument specifies the <mask> of bytes to read.",
]


def write_text() -> Path:
    "Write the docstrings of the standard library to a file, one paragraph per line."
    text = FOLDER / "data.txt"
    text.write_text("\n".join(docstrings()), encoding="utf-8")
    print(f"Text: {text}, {text.stat().st_size / 1e6:.1f} MB of docstrings")
    return text


def make_dataset(text: Path) -> None:
    "Train a tokenizer and tokenize the text."
    task = tasks.create_tokenizer(
        data_path=text,
        tokenizer_config={
            "vocab_size": 4_000,
            "min_frequency": 2,
            "max_length": 128,
            "path_to_save_tokenizer": FOLDER / "tokenizer",
            "path_to_save_dataset": FOLDER / "tokenized_dataset",
        },
    )
    counts = task.train()
    print(
        f"Dataset: {counts['documents']:,} documents became {counts['sequences']:,} sequences of {counts['tokens']:,} tokens\n"
    )


def create_run(**changes) -> tasks.MLMTask:
    "Prepare the run, new or from its checkpoint."
    return tasks.create_mlm(tokenizer=FOLDER / "tokenizer", tokenized_dataset=FOLDER / "tokenized_dataset", **changes)


def train_in_two_sessions(entropy: float) -> None:
    "Train to the middle, stop, and let a new task go on from the checkpoint to the end."
    first = create_run(
        model_config={
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "initializer_range": 0.06,  # A narrow model begins better with larger weights
            "hidden_dropout_prob": 0.0,  # Little text, few passes: nothing is learnt by heart yet
            "attention_probs_dropout_prob": 0.0,
        },
        training_config={
            "output_dir": FOLDER / "model",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 4,
            "learning_rate": 1e-3,
            "logging_steps": 250,
            "save_steps": 1_000,
            "save_total_limit": 2,
            "bf16": False,  # So small a model gains nothing by it
            "disable_tqdm": True,  # Lines instead of a bar: they read well in a log, too
        },
    )
    arithmetic = first.arithmetic()
    half = arithmetic.steps // 2
    print(f"First session, to step {half:,}:")
    first.train(stop_at_step=half)
    second = create_run(checkpoint_path=FOLDER / "model")
    print(f"Second session, resumed from step {second.state.step:,}:")
    history = second.train()
    print(history)
    history.plot(FOLDER / "loss.png", unigram_entropy=entropy)
    speed = history.log_history[-1]["tokens_per_second"]
    print(f"\n{speed:,.0f} tokens/s at the end; the curve is in {FOLDER / 'loss.png'}")
    loss = history.log_history[-1]["loss"]
    print(
        f"Masked loss {loss:.2f} nats, unigram entropy of the text {entropy:.2f} nats: a model that knows only word frequencies is at the latter"
    )


def fill_masks() -> None:
    "Ask the final model through stock transformers."
    fill_mask = pipeline("fill-mask", model=str(FOLDER / "model" / "final_model"))
    for sentence in SENTENCES:
        answers = ", ".join(
            f"{answer['token_str'].strip()} {answer['score']:.0%}" for answer in fill_mask(sentence, top_k=5)
        )
        print(f"  {sentence}\n    {answers}")


def main() -> None:
    "Run the demo in an empty folder."
    logging.basicConfig(level=logging.WARNING, format="  %(message)s")
    logging.getLogger("langmlm").setLevel(logging.INFO)  # Progress: loss, learning rate, tokens/s
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    make_dataset(write_text())
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    train_in_two_sessions(
        unigram_entropy(open_dataset(FOLDER / "tokenized_dataset"), tokenizer.all_special_ids, len(tokenizer))
    )
    print("\nFive masked sentences, through transformers.pipeline:")
    fill_masks()


if __name__ == "__main__":
    main()
