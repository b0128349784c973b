"A text that the tokenizer does not know is noticed at its beginning, and counted to its end."

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from langmlm.tasks import create_tokenizer
from langmlm.tokens.encode import find_unknown_ids
from langmlm.tokens.tokenizer import SPECIAL_TOKENS

ROLES = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def word_piece(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A WordPiece tokenizer of English."
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"vocab_size": 800, "special_tokens": [*SPECIAL_TOKENS], "show_progress": False}
    backend.train_from_iterator(documents[:500], trainers.WordPieceTrainer(**options))
    folder = tmp_path_factory.mktemp("wordpiece") / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES).save_pretrained(folder)
    return folder


def proteins(number: int) -> list[str]:
    "Lines of 120 letters, of which WordPiece makes a single unknown token each."
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 120)) for _ in range(number)]


def tokenize(lines: list[str], tokenizer: Path, folder: Path):
    "Tokenize lines into a folder, and return the report."
    (folder / "data.txt").write_text("\n".join(lines), encoding="utf-8")
    return create_tokenizer(folder / "data.txt", {"path_to_save_dataset": folder / "dataset"}, tokenizer).train()


def test_proteins(word_piece: Path, tmp_path: Path):
    "The example of the issue: 2,000 lines of protein are 2,000 unknown tokens, and an error."
    with pytest.raises(ValueError, match="2,000 of the first 2,000 tokens are unknown to the tokenizer"):
        tokenize(proteins(2_000), word_piece, tmp_path)
    assert not (tmp_path / "dataset").exists()


def test_the_first_shard_decides(word_piece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The error comes before the rest of the corpus is read; unknown text further on is no error."
    from langmlm import tasks
    from langmlm.tokens import shards

    read, lines = [], proteins(4_000)

    def write_dataset(corpus, *arguments, **options):
        documents = corpus.documents

        def counted(part):
            for document in documents(part):
                read.append(document)
                yield document

        monkeypatch.setattr(type(corpus), "documents", lambda self, part: counted(part))
        return shards.write_dataset(corpus, *arguments, **options, shard_characters=50_000)

    monkeypatch.setattr(tasks, "write_dataset", write_dataset)
    with pytest.raises(ValueError, match="of the first .* tokens are unknown"):
        tokenize(lines, word_piece, tmp_path)
    assert 400 < len(read) < 4_000


def test_some_unknown_tokens(
    documents: list[str], word_piece: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    "They are counted exactly; more than 1% are a warning."
    report = tokenize([*documents[:300], *["☃"] * 10], word_piece, tmp_path)
    unknown = [id for row in read_ids(tmp_path / "dataset") for id in row].count(3)
    assert report["statistics"]["unknown"] == unknown >= 10
    assert f"unknown tokens      {unknown:,} (" in str(report)
    (tmp_path / "more").mkdir()
    assert "unknown to the tokenizer" not in caplog.text
    report = tokenize([*documents[:300], *["☃"] * 5_000], word_piece, tmp_path / "more")
    assert f"{report['statistics']['unknown']:,} of {report['statistics']['tokens']:,} tokens" in caplog.text


def read_ids(folder: Path) -> list[list[int]]:
    "The ids of the training split."
    from datasets import load_from_disk

    return load_from_disk(str(folder))["train"]["input_ids"]


def test_unknown_ids(tokenizer):
    "The role of the tokenizer, the model's own name for it, or none."
    assert find_unknown_ids(tokenizer) == [3]
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "?": 2}, unk_token="?"))
    assert find_unknown_ids(PreTrainedTokenizerFast(tokenizer_object=backend)) == [2]
    assert find_unknown_ids(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")) == [0, 2]
    assert find_unknown_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))) == []
