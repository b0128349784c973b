"""The whole pipeline, from raw text to a model that fills masks: train, stop in the middle, resume, use the model.

The text is available on every machine with Python: the docstrings of the standard library.
"""

import logging
import shutil
import sys
from pathlib import Path

from transformers import pipeline

from langmlm import tasks
from langmlm.data.dataset import open_dataset, unigram_entropy
from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import load_tokenizer

FOLDER = Path("demo_run")
DATA = {"tokenizer": FOLDER / "tokenizer", "tokenized_dataset": FOLDER / "tokenized_dataset"}
MODEL_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "initializer_range": 0.06,  # A narrow model learns faster from larger initial weights
    "hidden_dropout_prob": 0.0,  # The run is too short to overfit
    "attention_probs_dropout_prob": 0.0,
}
TRAINING_CONFIG = {
    "output_dir": FOLDER / "model",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 4,
    "learning_rate": 1e-3,
    "logging_steps": 250,
    "save_steps": 1_000,
    "save_total_limit": 2,
    "bf16": False,  # A model this small does not become faster
    "disable_tqdm": True,  # Progress goes to the log instead of a bar
}
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
    print(f"\nText: {text}, {text.stat().st_size / 1e6:.1f} MB")
    return text


def create_dataset(text: Path) -> float:
    "Train a tokenizer, tokenize the text, and return the unigram entropy of the dataset."
    options = {"vocab_size": 4_000, "min_frequency": 2, "max_length": 128}
    options |= {"path_to_save_tokenizer": DATA["tokenizer"], "path_to_save_dataset": DATA["tokenized_dataset"]}
    report = tasks.create_tokenizer(text, options).train()
    print("\nTokenized dataset:")
    print(report)
    tokenizer = load_tokenizer(DATA["tokenizer"])
    return unigram_entropy(open_dataset(DATA["tokenized_dataset"]), tokenizer.all_special_ids, len(tokenizer))


def train_and_resume(entropy: float) -> None:
    "Train half of a run, resume it from its checkpoint, and compare the loss with the unigram entropy."
    first = tasks.create_mlm(**DATA, model_config=MODEL_CONFIG, training_config=TRAINING_CONFIG)
    middle = first.arithmetic().steps // 2
    print(f"\nFirst session, to step {middle:,}:")
    first.train(stop_at_step=middle)

    second = tasks.create_mlm(**DATA, checkpoint_path=FOLDER / "model")
    print("\nSecond session, resumed from the checkpoint:")
    history = second.train()
    history.plot(FOLDER / "loss.png", unigram_entropy=entropy)
    loss = history.log_history[-1]["loss"]
    print(f"\nTraining loss {loss:.2f} nats; a model that only knows token frequencies has {entropy:.2f} nats.")
    print(f"Loss curve: {FOLDER / 'loss.png'}")


def fill_masks() -> None:
    "Load the final model with transformers, and print its predictions for masked words."
    print("\nMasked sentences and the five most probable tokens:")
    fill_mask = pipeline("fill-mask", model=str(FOLDER / "model" / "final_model"))
    for sentence in SENTENCES:
        predictions = [f"{found['token_str'].strip()} {found['score']:.0%}" for found in fill_mask(sentence, top_k=5)]
        print(f"  {sentence}\n    {', '.join(predictions)}")


def main() -> None:
    "Run the demo in an empty folder."
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="  %(message)s")
    logging.getLogger("langmlm").setLevel(logging.INFO)  # Progress: loss, learning rate, tokens per second
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    train_and_resume(create_dataset(write_text()))
    fill_masks()


if __name__ == "__main__":
    main()
