"Any text comes back from a tokenizer and from a dataset."

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, RobertaTokenizer

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import SPECIAL_TOKENS, TokenizerConfig, save_tokenizer, train_tokenizer


def texts(max_size: int) -> st.SearchStrategy[str]:
    "Any characters that UTF-8 can encode."
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size)


@pytest.fixture(scope="module")
def tokenizers(data: dict[str, Path]) -> list:
    "The tokenizer as both classes load it."
    return [kind.from_pretrained(data["tokenizer"]) for kind in (AutoTokenizer, RobertaTokenizer)]


@settings(max_examples=300, deadline=None)
@given(text=texts(200))
def test_text_decodes_to_itself(tokenizers: list, text: str):
    "Encoding and decoding is the identity in both classes; no token is unknown, and no text becomes a special token."
    encoded = [tokenizer(text, split_special_tokens=True)["input_ids"] for tokenizer in tokenizers]
    assert encoded[0] == encoded[1]
    assert not set(encoded[0][1:-1]) & set(range(len(SPECIAL_TOKENS)))
    assert tokenizers[0].decode(encoded[0][1:-1]) == text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(texts(200), min_size=1, max_size=20))
def test_documents_come_back(data: dict[str, Path], tmp_path: Path, lines: list[str]):
    "All lines with more than whitespace are in the dataset, in order and complete; a file without any is an error."
    file = tmp_path / "data.txt"
    file.write_bytes("\n".join(lines).encode())
    expected = "\n".join(lines).removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    expected = [line for line in expected if line.strip()]
    folder = {"path_to_save_dataset": tmp_path / "dataset"}
    if not expected:
        with pytest.raises(ValueError, match="no text" if file.stat().st_size else "names empty files"):
            tasks.create_tokenizer(file, folder, tokenizer=data["tokenizer"]).train()
        return
    tasks.create_tokenizer(file, {**folder, "max_length": 8}, tokenizer=data["tokenizer"]).train()
    corpus, tokenizer = open_dataset(tmp_path / "dataset"), AutoTokenizer.from_pretrained(data["tokenizer"])
    content = [token for row in range(len(corpus)) for token in corpus[row][1:-1].tolist()]
    assert tokenizer.decode(content) == "".join(expected)
    assert corpus.lengths.max() <= 8 and corpus.manifest["documents"] == len(expected)


@pytest.fixture(scope="module")
def optioned(tmp_path_factory: pytest.TempPathFactory) -> list:
    "A tokenizer with all options, as trained and as both classes load it."
    folder = tmp_path_factory.mktemp("optioned")
    options = {"lowercase": True, "unicode_normalization": "NFC", "split_digits": True}
    options["special_tokens"] = [*SPECIAL_TOKENS, "@USER", "HTTPURL"]
    tokenizer = train_tokenizer(islice(docstrings(), 500), TokenizerConfig(vocab_size=600, **options))
    save_tokenizer(tokenizer, folder)
    return [tokenizer, AutoTokenizer.from_pretrained(folder), RobertaTokenizer.from_pretrained(folder)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts(30))
@example(text="@USER Said: É 2024 HTTPURL")
def test_options_survive_both_classes(optioned: list, text: str):
    "Both classes encode as the trained tokenizer does, and no token has two digits."
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for tokenizer in optioned]
    assert ids[0] == ids[1] == ids[2]
    tokens = optioned[0].convert_ids_to_tokens(ids[0])
    assert all(sum(character in "0123456789" for character in token) <= 1 for token in tokens)
    backend = optioned[0].backend_tokenizer
    if not any(token in text for token in ("@USER", "HTTPURL")):
        assert optioned[2].decode(ids[2][1:-1]) == backend.normalizer.normalize_str(text)
