"New words are found as whole words, and nothing else changes."

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram, WordLevel, WordPiece
from tokenizers.trainers import UnigramTrainer, WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer, RobertaTokenizerFast

from langmlm.config import SPECIAL_TOKENS, ConfigError, TokenizerConfig
from langmlm.text.corpus import docstrings
from langmlm.tokens.encode import encode_documents, find_word_starts, token_bytes
from langmlm.train.extend import _is_word, add_words, find_new_words, spell_words
from langmlm.tokens.tokenizer import fingerprint_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer

ROLES = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(islice(docstrings(), 3_000))


def train_bpe(documents: list[str], **options) -> PreTrainedTokenizerFast:
    return train_tokenizer(documents[:500], TokenizerConfig(vocab_size=1_000, **options))


def train_unigram(documents: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=1_000, special_tokens=list(SPECIAL_TOKENS[:4]), unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(documents[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)  # `<mask>` is an added token outside the model


def train_wordpiece(documents: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=1_000, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator(documents[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


KINDS = {
    "bpe": train_bpe,
    "bpe, lowercase, digits": lambda documents: train_bpe(documents, lowercase=True, split_digits=True),
    "bpe, prefix space": lambda documents: train_bpe(documents, add_prefix_space=True),
    "unigram": train_unigram,
    "wordpiece": train_wordpiece,
}


@pytest.fixture(scope="module")
def trained(documents: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    return {kind: train(documents) for kind, train in KINDS.items()}


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[int]:
    return np.concatenate([ids for ids, _ in encode_documents(documents, tokenizer, num_workers=1)]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_stand_for_exactly_the_pieces_they_replace(kind: str, trained, documents: list[str], tmp_path: Path):
    old = trained[kind]
    units = list(dict.fromkeys([*find_new_words(documents, old, 200), *spell_words(["docstring"], old)]))
    new, pieces = add_words(old, units)
    assert len(new) == len(old) + len(units) and 200 <= len(units) <= 202
    before, after = encode(old, documents), encode(new, documents)
    expanded = [id for token in after for id in (pieces[token - len(old)] if token >= len(old) else [token])]
    assert expanded == before and len(after) < 0.95 * len(before)
    save_tokenizer(new, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert fingerprint_tokenizer(loaded) == fingerprint_tokenizer(new) and loaded.model_max_length == old.model_max_length
    assert loaded.convert_tokens_to_ids(units) == list(range(len(old), len(new)))
    assert {**loaded.get_vocab(), **old.get_vocab()} == loaded.get_vocab()
    assert [getattr(loaded, f"{role}_id") for role in ROLES] == [getattr(old, f"{role}_id") for role in ROLES]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_what_the_old_tokenizer_gives(kind: str, trained, documents: list[str]):
    old = trained[kind]
    new, _ = add_words(old, find_new_words(documents, old, 500))
    for text in [*documents[:200], "<mask>", "a <mask> subprocess", " subprocess", "(subprocess)subprocess\tsubprocess\n"]:
        decoded = [
            tokenizer.decode(tokenizer(text, verbose=False)["input_ids"], clean_up_tokenization_spaces=False)
            for tokenizer in (old, new)
        ]
        assert decoded[0] == decoded[1]
        if kind == "bpe":
            assert decoded[1].replace("<s>", "").replace("</s>", "") == text.replace(" <mask>", "<mask>")


def test_words_are_found_as_whole_words_only(trained):
    new, _ = add_words(old := trained["bpe"], ["Ġsubprocess", "subprocess"])
    for text in ("subprocesses", " subprocesses", "mysubprocess", "sub process", "Subprocess"):
        assert new.tokenize(text) == old.tokenize(text)
    for text, expected in ((" subprocess", ["Ġsubprocess"]), ("(subprocess)", ["(", "subprocess", ")"])):
        assert new.tokenize(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_word_begins_a_word_and_has_its_text(kind: str, trained):
    old = trained[kind]
    new, pieces = add_words(old, spell_words(["subprocess"], old))
    spelled, vocabulary = token_bytes(new)[len(old) :], token_bytes(new)
    assert all(b"".join(vocabulary[id] for id in ids) == text for ids, text in zip(pieces, spelled))
    with_space = [text.startswith(b" ") for text in spelled]
    assert find_word_starts(new)[len(old) :].tolist() == with_space and any(with_space)


def test_all_classes_of_transformers_agree_on_a_saved_tokenizer(trained, tmp_path: Path):
    new, _ = add_words(trained["bpe"], ["Ġsubprocess"])
    save_tokenizer(new, tmp_path / "tokenizer")
    for kind in (AutoTokenizer, RobertaTokenizer, RobertaTokenizerFast, PreTrainedTokenizerFast):
        assert kind.from_pretrained(tmp_path / "tokenizer").tokenize("a subprocess") == ["a", "Ġsubprocess"], kind


def test_added_tokens_keep_their_ids(documents: list[str]):
    old = train_bpe(documents, special_tokens=[*SPECIAL_TOKENS, "@USER"])
    old.add_tokens(["HTTPURL"])
    new, _ = add_words(old, ["Ġsubprocess"])
    new = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(new.backend_tokenizer.to_str()), **ROLES)
    for token in ("@USER", "HTTPURL", "<mask>"):
        assert new.convert_tokens_to_ids(token) == old.convert_tokens_to_ids(token)
    assert new.tokenize("@USER HTTPURL subprocess") == ["@USER", "Ġ", "HTTPURL", "Ġsubprocess"]


def test_words_can_be_added_twice(trained):
    old = trained["bpe"]
    once, _ = add_words(old, ["Ġsubprocess"])
    twice, pieces = add_words(once, ["Ġsubprocesses"])
    assert twice.tokenize("a subprocess, subprocesses") == ["a", "Ġsubprocess", ",", "Ġsubprocesses"]
    assert pieces == [once.convert_tokens_to_ids(old.tokenize(" subprocesses"))]
    assert spell_words(["subprocess"], once) == ["subprocess"]  # With a space, it is a token already


def test_words_are_chosen_by_what_they_save(trained, documents: list[str]):
    old = trained["bpe"]
    counts = Counter(word for document in documents for word in document.split(" ")[1:] if word.isalpha())
    saved = Counter({word: count * (len(old.tokenize(f" {word}")) - 1) for word, count in counts.items() if count >= 50})
    found = find_new_words(documents, old, 20, min_count=50)
    assert len(found) == 20 and found == find_new_words(documents, old, 100, min_count=50)[:20]
    best = {f"Ġ{word}" for word, _ in saved.most_common(10)}
    assert len(best & set(found)) >= 8  # Words before punctuation count, too
    assert not find_new_words(["0123456789 ----- 0123456789"] * 20, old, 20)
    assert not find_new_words(["subprocess"] * 9, old, 20) and find_new_words(["subprocess"] * 10, old, 20) == ["subprocess"]


def test_a_word_that_is_unknown_as_a_whole_is_added(trained):
    old = trained["wordpiece"]
    assert old.tokenize("日本語x") != ["日本語x"] and spell_words(["ᚠᚢᚦ"], old) == ["ᚠᚢᚦ"]
    new, _ = add_words(old, ["ᚠᚢᚦ"])
    assert new.tokenize("a ᚠᚢᚦ") == ["a", "ᚠᚢᚦ"]


def test_what_is_no_word_is_an_error(trained):
    with pytest.raises(ConfigError) as error:
        spell_words(["docstring", "look-up", "two words", "", " ", 3], trained["bpe"])
    assert len(error.value.errors) == 5 and "'look-up' is not one word" in str(error.value)


def test_tokenizers_without_words_are_an_error():
    backend = Tokenizer(WordLevel({token: id for id, token in enumerate(SPECIAL_TOKENS)}, unk_token="<unk>"))
    for pre_tokenizer, expected in ((None, "without a pre-tokenizer"), (pre_tokenizers.Whitespace(), "WordLevel")):
        if pre_tokenizer:
            backend.pre_tokenizer = pre_tokenizer
        with pytest.raises(ValueError, match=expected):
            find_new_words(["text"], PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES), 10)


def test_tokens_that_no_merge_reaches_are_reported(trained, caplog: pytest.LogCaptureFixture):
    old = trained["bpe"]
    with caplog.at_level(logging.WARNING):
        add_words(old, ["Ġsubprocess"])
    assert not caplog.records
    content = json.loads(old.backend_tokenizer.to_str())
    content["model"]["vocab"]["Ġdocstring"] = len(old)
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **ROLES)
    with caplog.at_level(logging.WARNING):
        add_words(old, ["Ġsubprocess"])
    assert "Ġdocstring" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_extended_twice(trained: dict[str, PreTrainedTokenizerFast], documents: list[str], kind: str):
    "Words that an earlier extension has added are not added again, and every new word has an id and pieces of its own."
    once, _ = add_words(trained[kind], spell_words(["breakpoint", "watcher"], trained[kind]))
    assert spell_words(["breakpoint"], once) == []
    assert not {*find_new_words(documents, once, 20)} & once.get_vocab().keys()
    units = spell_words(["breakpoint", "alphabetical"], once)
    twice, pieces = add_words(once, units)
    ids = twice.convert_tokens_to_ids(units)
    assert units and ids == [*range(len(once), len(once) + len(units))] and len(twice) == len(once) + len(units)
    expected = [[piece.id for piece in once.backend_tokenizer.model.tokenize(unit)] for unit in units]
    assert pieces == expected


def test_whitespace_is_no_word():
    "Indentation is frequent in code, and saves many tokens."
    assert not any(_is_word(text) for text in ("", "    ", "\t\t")) and _is_word(" wörd")
