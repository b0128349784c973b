"Documents and a small tokenizer, shared by the tests of the tokens package."

import pytest

from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    "The docstrings of the standard library."
    return list(docstrings())


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]):
    "A tokenizer with 2,000 tokens."
    return train_tokenizer(documents, TokenizerConfig(vocab_size=2_000, max_length=64))
