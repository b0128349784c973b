"The tagging benchmark: splits do not overlap, baselines are right on a text that they can learn, words are aligned."

from pathlib import Path

import pytest
from tagging import Tagger, accuracy, evaluate_tagger, frequent_tags, linear_tags, read_tagged, sample_tagged

from langmlm.testing import tiny_run

NOUNS, VERBS = ("cat", "dog", "unbelievably-long-word"), ("runs", "sees", "likes")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tags") / "tagged.conll"
    sentences = [f"the\tD\n{noun}\tN\n{verb}\tV\nnumber{i}\tX" for i in range(12) for noun in NOUNS for verb in VERBS]
    path.write_text("\n\n".join([*sentences, sentences[0]]), encoding="utf-8")
    return path


def test_splits_do_not_overlap(file: Path):
    splits = read_tagged(file)
    texts = {name: {" ".join(words) for words, _ in part} for name, part in splits.items()}
    assert sum(map(len, splits.values())) == 12 * 9 == len(texts["train"] | texts["dev"] | texts["test"])
    assert all(splits.values()) and len(sample_tagged(splits, 5, 4)["train"]) == 5


def test_baselines_tag_known_words(file: Path):
    splits = read_tagged(file)
    for tagger in (frequent_tags, linear_tags):
        found = tagger(splits["train"], splits["test"])
        known = [([*tags[:3]], (words[:3], expected[:3])) for tags, (words, expected) in zip(found, splits["test"])]
        assert accuracy(*zip(*known)) == 1.0


def test_accuracy_counts_words():
    assert accuracy([["A", "B"], ["A"]], [(["x", "y"], ["A", "A"]), (["z"], ["A"])]) == pytest.approx(2 / 3)


def test_a_tagger_learns_and_keeps_words_aligned(file: Path, tmp_path: Path):
    task = tiny_run(tmp_path, documents=100, max_steps=1)
    task.train()
    model = str(tmp_path / "run" / "final_model")
    splits = read_tagged(file)
    tagger = Tagger(model, ["D", "N", "V", "X"], pretrained=True, device="cpu")
    tagger.train(splits["train"] * 3, 3e-3, seed=0)
    found = tagger.predict(splits["test"])
    assert [len(tags) for tags in found] == [len(words) for words, _ in splits["test"]]
    assert accuracy(found, splits["test"]) > 0.9


def test_all_contenders_have_scores(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tagging.EPOCHS", 1)
    task = tiny_run(tmp_path, documents=100, max_steps=1)
    task.train()
    scores = evaluate_tagger(file, str(tmp_path / "run" / "final_model"), 20, 10, (0, 1), True, "cpu")
    assert [len(runs) for runs in scores.values()] == [2, 1, 1, 2]
    assert all(0 <= run["accuracy"] <= 1 for runs in scores.values() for run in runs)
