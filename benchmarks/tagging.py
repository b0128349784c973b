"""Fine-tune saved models to tag words, with stock transformers, next to taggers that know only words.

The file has a word and its tag per line, and an empty line after each sentence. A hash of the sentence decides on its
split: 80 % training, 10 % development, 10 % test. Its raw text must not be in the text of pretraining.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from data import read_text
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

LEARNING_RATES, EPOCHS, BATCH_SIZE, WARM_UP = (1e-3,), 5, 16, 0.1
MAX_WORDS = 40  # Longer sentences, a tenth of them, are left out: a batch is padded to its longest
IGNORED = -100  # Label of what is no first token of a word

Sentence = tuple[list[str], list[str]]  # Words and tags


def read_tagged(file: Path) -> dict[str, list[Sentence]]:
    "Return the sentences of a file by split, without duplicates."
    splits: dict[str, list[Sentence]] = {"train": [], "dev": [], "test": []}
    blocks = sorted({block.strip() for block in read_text(file).split("\n\n") if block.strip()})
    for block in blocks:
        words, tags = zip(*(line.split("\t") for line in block.splitlines()))
        if len(words) > MAX_WORDS:
            continue
        tenth = int(hashlib.sha256(" ".join(words).encode()).hexdigest(), 16) % 10
        splits[{8: "dev", 9: "test"}.get(tenth, "train")].append((list(words), list(tags)))
    return splits


def sample_tagged(splits: dict[str, list[Sentence]], train: int, test: int) -> dict[str, list[Sentence]]:
    "Return random sentences of each split; half as many for development as for the test."
    generator, limits = np.random.default_rng(0), {"train": train, "dev": test // 2, "test": test}
    return {
        name: [splits[name][index] for index in generator.permutation(len(splits[name]))[:limit]]
        for name, limit in limits.items()
    }


def frequent_tags(train: list[Sentence], sentences: list[Sentence]) -> list[list[str]]:
    "Tag every word with its most frequent tag, and unknown words with the most frequent of all."
    counts, total = defaultdict(Counter), Counter()
    for words, tags in train:
        total.update(tags)
        for word, tag in zip(words, tags):
            counts[word][tag] += 1
    default = total.most_common(1)[0][0]
    known = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    return [[known.get(word, default) for word in words] for words, _ in sentences]


def linear_tags(train: list[Sentence], sentences: list[Sentence]) -> list[list[str]]:
    "Tag every word by a linear classifier of the word, its ending and its neighbors."
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier

    def features(words: list[str]) -> Iterator[list[str]]:
        for before, word, after in zip(["", *words], words, [*words[1:], ""]):
            endings = [f"ends with {word[-size:]}" for size in (1, 2, 3)]
            yield [word.lower(), f"after {before}", f"before {after}", f"capital {word[:1].isupper()}", *endings]

    hashing, classifier = (
        FeatureHasher(2**16, input_type="string"),
        SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=20),
    )
    classifier.set_params(random_state=0, tol=None)
    seen = [entry for words, _ in train for entry in features(words)]
    classifier.fit(hashing.transform(seen), [tag for _, tags in train for tag in tags])
    asked = [entry for words, _ in sentences for entry in features(words)]
    found = iter(classifier.predict(hashing.transform(asked)))
    return [list(islice(found, len(words))) for words, _ in sentences]


class Tagger:
    "A transformer that tags the first token of every word."

    def __init__(self, model: str, tags: list[str], pretrained: bool, device: str):
        self.tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
        self.config = AutoConfig.from_pretrained(model, num_labels=len(tags))
        self.ids, self.tags, self.device = {tag: index for index, tag in enumerate(tags)}, tags, device
        self.weights = model if pretrained else None

    def batch(self, sentences: list[Sentence]) -> dict[str, torch.Tensor]:
        "Tokenize sentences; `labels` has the tag at the first token of each word."
        words, options = (
            [words for words, _ in sentences],
            {"truncation": True, "padding": True, "return_tensors": "pt"},
        )
        limit = self.config.max_position_embeddings - 2
        inputs = self.tokenizer(words, is_split_into_words=True, max_length=limit, **options)
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        for row, (_, tags) in enumerate(sentences):
            numbers = inputs.word_ids(row)
            for column, number in enumerate(numbers):
                if number is not None and number != numbers[column - 1]:
                    labels[row, column] = self.ids.get(tags[number], IGNORED)
        return {name: tensor.to(self.device) for name, tensor in {**inputs, "labels": labels}.items()}

    def train(self, sentences: list[Sentence], rate: float, seed: int) -> None:
        "Fine-tune with AdamW and a linear schedule."
        torch.manual_seed(seed)
        kind = AutoModelForTokenClassification
        loaded = (
            kind.from_pretrained(self.weights, config=self.config) if self.weights else kind.from_config(self.config)
        )
        self.model, generator = loaded.to(self.device).train(), np.random.default_rng(seed)
        optimizer = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=0.01)
        total = EPOCHS * math.ceil(len(sentences) / BATCH_SIZE)
        warm_up = math.ceil(WARM_UP * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (total - step) / (total - warm_up))
        )
        for _ in range(EPOCHS):
            order = sorted(generator.permutation(len(sentences)), key=lambda index: len(sentences[index][0]))
            starts = range(0, len(order), BATCH_SIZE)  # Batches of similar length, in random order
            for start in generator.permutation(starts):
                part = [sentences[index] for index in order[start : start + BATCH_SIZE]]
                self.model(**self.batch(part)).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    @torch.inference_mode()
    def predict(self, sentences: list[Sentence]) -> list[list[str]]:
        "Tag sentences; words that were cut off get an empty tag."
        self.model.eval()
        result = []
        for start in range(0, len(sentences), 4 * BATCH_SIZE):
            part = sentences[start : start + 4 * BATCH_SIZE]
            best = self.model(**self.batch(part)).logits.argmax(-1).cpu().numpy()
            firsts = [self.tokenizer(words, is_split_into_words=True).word_ids() for words, _ in part]
            for row, (words, _) in enumerate(part):
                tags = [""] * len(words)
                for column in range(min(len(firsts[row]), best.shape[1]) - 1, -1, -1):  # The first token comes last
                    if firsts[row][column] is not None:
                        tags[firsts[row][column]] = self.tags[best[row, column]]
                result.append(tags)
        return result


def accuracy(predicted: list[list[str]], sentences: list[Sentence]) -> float:
    "Return the share of words that are tagged right."
    pairs = [pair for found, (_, tags) in zip(predicted, sentences) for pair in zip(found, tags, strict=True)]
    return sum(found == tag for found, tag in pairs) / len(pairs)


def evaluate_tagger(
    file: Path, model: str, train: int, test: int, seeds: tuple[int, ...], baselines: bool, device: str
) -> dict[str, list[dict]]:
    "Return test accuracies by contender; development sentences decide between several learning rates."
    transformers_logging.set_verbosity_error()  # It would report that the head is new
    parts = sample_tagged(read_tagged(file), train, test)
    tags = sorted({tag for _, found in parts["train"] for tag in found})
    contenders: dict[str, Callable | None] = {"the model": None}
    if baselines:
        contenders |= {"most frequent tag": frequent_tags, "linear tagger": linear_tags, "from scratch": None}
    scores: dict[str, list[dict]] = {}
    for name, tagger in contenders.items():
        if tagger:
            scores[name] = [{"accuracy": accuracy(tagger(parts["train"], parts["test"]), parts["test"])}]
            continue
        tuned, development = Tagger(model, tags, name == "the model", device), {}
        for rate in LEARNING_RATES if len(LEARNING_RATES) > 1 else ():
            tuned.train(parts["train"], rate, seeds[0])
            development[rate] = accuracy(tuned.predict(parts["dev"]), parts["dev"])
        best, scores[name] = max(LEARNING_RATES, key=lambda rate: development.get(rate, 0.0)), []
        for seed in seeds:
            tuned.train(parts["train"], best, seed)
            found = accuracy(tuned.predict(parts["test"]), parts["test"])
            scores[name].append({"accuracy": found, "setting": best, "seed": seed})
        print(f"    {name}: {[round(run['accuracy'], 3) for run in scores[name]]} with {best:g}", flush=True)
    return scores
