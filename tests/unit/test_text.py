"Any text comes back from a tokenizer and from a dataset."

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, RobertaTokenizer

from langmlm import tasks
from langmlm.data.dataset import open_dataset
from langmlm.tokens.tokenizer import SPECIAL_TOKENS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def tokenizers(data: dict[str, Path]) -> list:
    "The tokenizer as both classes load it."
    return [kind.from_pretrained(data["tokenizer"]) for kind in (AutoTokenizer, RobertaTokenizer)]


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_text_decodes_to_itself(tokenizers: list, text: str):
    "Encoding and decoding is the identity, in both classes; nothing is unknown, and nothing in a text is a special token."
    encoded = [tokenizer(text, split_special_tokens=True)["input_ids"] for tokenizer in tokenizers]
    assert encoded[0] == encoded[1]
    assert not set(encoded[0][1:-1]) & set(range(len(SPECIAL_TOKENS)))
    assert tokenizers[0].decode(encoded[0][1:-1]) == text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(TEXT, min_size=1, max_size=20))
def test_documents_come_back(data: dict[str, Path], tmp_path: Path, lines: list[str]):
    "All lines that hold something are in the dataset, in order, whole; a file without any is refused."
    file = tmp_path / "data.txt"
    file.write_bytes("\n".join(lines).encode())
    expected = "\n".join(lines).removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    expected = [line for line in expected if line.strip()]
    if not file.stat().st_size or not expected:
        with pytest.raises(ValueError, match="nothing"):
            tasks.create_tokenizer(
                file, {"path_to_save_dataset": tmp_path / "dataset"}, tokenizer=data["tokenizer"]
            ).train()
        return
    tasks.create_tokenizer(
        file, {"path_to_save_dataset": tmp_path / "dataset", "max_length": 8}, tokenizer=data["tokenizer"]
    ).train()
    corpus, tokenizer = open_dataset(tmp_path / "dataset"), AutoTokenizer.from_pretrained(data["tokenizer"])
    content = [token for row in range(len(corpus)) for token in corpus[row][1:-1].tolist()]
    assert tokenizer.decode(content) == "".join(expected)
    assert corpus.lengths.max() <= 8 and corpus.manifest["documents"] == len(expected)
