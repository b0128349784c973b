"Options, training, saving, loading and reuse of tokenizers."

import copy
import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, RobertaConfig, RobertaTokenizer

from langmlm.config import _TOKENIZER_RULES, ConfigError, check_config
from langmlm.disk import find_damage, is_intact, read_manifest
from langmlm.text.corpus import TextError, docstrings, open_corpus
from langmlm.tokens import tokenizer as module
from langmlm.tokens.encode import Encoder
from langmlm.tokens.tokenizer import (
    SPECIAL_TOKENS,
    VOCABULARY_OPTIONS,
    TokenizerConfig,
    copy_backend,
    draw_training_text,
    fingerprint_tokenizer,
    load_tokenizer,
    make_untrained_tokenizer,
    reuse_or_train_tokenizer,
    save_tokenizer,
    train_tokenizer,
    wrap_backend,
    write_tokenizer_files,
)

TEXTS = ["  two spaces, one after ", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 flood 🌊!", "tab\tline\nnul\x00", "don't,won't...", ""]
INVALID = [
    {"vocab_size": 100},
    {"min_frequency": 0},
    {"max_length": 2, "stride": 0},
    {"special_tokens": list(SPECIAL_TOKENS[::-1])},
    {"special_tokens": [*SPECIAL_TOKENS, ""]},
    {"special_tokens": [*SPECIAL_TOKENS, 7]},
    {"special_tokens": [*SPECIAL_TOKENS, "<s>"]},
    {"special_tokens": [*SPECIAL_TOKENS, "‹prénom›", "[STRAßE]"]},
    {"special_tokens": [*SPECIAL_TOKENS, "Ġ"]},
    {"path_to_save_dataset": "./tokenizer"},
    {"text_column": ""},
    {"max_train_bytes": 2**31},
    {"stride": 510},
    {"validation_fraction": 1.0},
    {"shard": (2, 2)},
    {"shard": (0.0, 2)},
    {"num_workers": 0},
    {"document": "page"},
    {"encoding_errors": "ignore"},
    {"unicode_normalization": "NFX"},
    {"long_lines": "drop"},
    {"split_on": "line"},
    {"max_length": "512"},
]


@pytest.mark.parametrize("options", INVALID, ids=str)
def test_invalid_values_are_named(options: dict):
    "Each invalid value raises one error that names the option and the value."
    with pytest.raises(ConfigError) as caught:
        TokenizerConfig(**options)
    (name, *_), value = options, list(options.values())[0]
    assert len(caught.value.errors) == 1
    assert caught.value.errors[0].startswith(name) and caught.value.errors[0].endswith(f"got {value!r}")


def test_valid_values():
    "Valid values raise nothing, and choices belong to options that exist."
    config = TokenizerConfig(shard=(1, 2), unicode_normalization="NFC", special_tokens=[*SPECIAL_TOKENS, "@USER", "名", "<€é>"])
    check_config(config, "tokenizer_config", _TOKENIZER_RULES)
    assert TokenizerConfig(max_train_bytes=2**31 - 1).max_train_bytes < 2**31
    names = {entry.name for entry in fields(TokenizerConfig)}
    assert {name for options, *_ in _TOKENIZER_RULES for name in options.split()} <= names and set(VOCABULARY_OPTIONS) <= names
    assert len(ByteLevel.alphabet()) == 256


def test_words():
    "Normalization, prefix space and split digits apply before merges are learned."
    options = {"lowercase": True, "unicode_normalization": "NFC", "add_prefix_space": True, "split_digits": True}
    changed = make_untrained_tokenizer(TokenizerConfig(**options))
    assert module._split_words("In 2024, É", changed) == module._split_words(" in 2024, é", changed)
    assert module._split_words("In 2024", changed) == ["Ġin", "Ġ", "2", "0", "2", "4"]


def test_sample_is_reproducible_and_bounded(documents: list[str], caplog: pytest.LogCaptureFixture):
    "The whole text is used if it fits; a sample depends on the seed only; many distinct words shrink it with a warning."
    plain = make_untrained_tokenizer(TokenizerConfig())
    everything = draw_training_text(documents, plain, TokenizerConfig())
    assert everything.bytes == everything.total_bytes and list(everything.pieces())[:10] == documents[:10]
    tenth = TokenizerConfig(max_train_bytes=everything.bytes // 10)
    sample = draw_training_text(documents, plain, tenth)
    assert list(sample.pieces()) == list(draw_training_text(iter(documents), plain, tenth).pieces())
    fewer = draw_training_text(documents, plain, TokenizerConfig(), max_distinct=50_000)
    assert fewer.bytes < everything.bytes and "distinct words" in caplog.text
    assert module._MAX_DISTINCT_BYTES < 8e9 / 110


def test_sample_without_text(documents: list[str]):
    plain = make_untrained_tokenizer(TokenizerConfig())
    with pytest.raises(ValueError, match="max_train_bytes=1 is too small for any piece of the text: set 1,000,000"):
        draw_training_text(documents, plain, TokenizerConfig(max_train_bytes=1))
    assert draw_training_text([], plain, TokenizerConfig(max_train_bytes=1)).total_bytes == 0


def test_every_text_round_trips(tokenizer):
    "Special tokens have ids 0 to 4, no text has an unknown token, and every text decodes to itself."
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4] and len(tokenizer) == 2_000
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[1:-1]) == text and tokenizer.unk_token_id not in ids
    plain = tokenizer("type <mask> here </s>", split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(plain[1:-1]) == "type <mask> here </s>" and tokenizer.mask_token_id not in plain
    assert tokenizer.mask_token_id in tokenizer("type <mask> here </s>")["input_ids"]


def test_additional_special_tokens_keep_their_role():
    "A tokenizer that is made anew from its backend has them, too."
    tokenizer = train_tokenizer(["storm and flood"], TokenizerConfig(vocab_size=300))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<url>", "<user>"]})
    again = wrap_backend(tokenizer.backend_tokenizer, tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens and "<url>" in again.all_special_tokens


def test_additional_special_tokens_are_words(caplog: pytest.LogCaptureFixture):
    "They are never split, can be masked, and survive decoding; a small text gives a smaller vocabulary and a warning."
    config = TokenizerConfig(special_tokens=[*SPECIAL_TOKENS, "@USER"])
    tiny = train_tokenizer(["@USER is it flooding? @USER it is"] * 3, config)
    assert tiny.convert_tokens_to_ids("@USER") == 5 and len(tiny) < 300
    assert tiny.tokenize("@USER is", split_special_tokens=True) == tiny.tokenize("@USER is")
    assert tiny.decode(tiny("hello @USER, hello")["input_ids"], skip_special_tokens=True) == "hello @USER, hello"
    assert sorted(tiny.all_special_ids) == [0, 1, 2, 3, 4]
    assert "too few frequent pairs" in caplog.text


@pytest.mark.parametrize(
    "text, same, options",
    [
        ("The FILE", "the file", {"lowercase": True}),
        ("cafe\u0301", "café", {"unicode_normalization": "NFC"}),
        ("café", "cafe\u0301", {"unicode_normalization": "NFD"}),
        ("ﬁle", "file", {"unicode_normalization": "NFKD"}),
        ("file", " file", {"add_prefix_space": True}),
    ],
)
def test_each_option_alone(documents: list[str], tokenizer, text: str, same: str, options: dict):
    "An option makes two texts equal that are different without it."
    changed = train_tokenizer(documents[::8], TokenizerConfig(vocab_size=500, **options))
    assert changed.tokenize(text) == changed.tokenize(same)
    assert tokenizer.tokenize(text) != tokenizer.tokenize(same)


def test_split_digits(documents: list[str]):
    "No token contains two digits."
    changed = train_tokenizer(documents[::8], TokenizerConfig(vocab_size=500, split_digits=True))
    assert not [token for token in changed.get_vocab() if sum(character.isdigit() for character in token) > 1]


def test_saved_tokenizers_encode_alike(documents: list[str], tokenizer, tmp_path: Path):
    "`AutoTokenizer` and `RobertaTokenizer` load both kinds, and so they do after saving again."
    options = {"lowercase": True, "unicode_normalization": "NFKC", "add_prefix_space": True, "split_digits": True}
    special = [*SPECIAL_TOKENS, "@USER"]
    normalized = train_tokenizer(documents, TokenizerConfig(vocab_size=2_000, max_length=64, special_tokens=special, **options))
    for index, made in enumerate((tokenizer, normalized)):
        save_tokenizer(made, tmp_path / f"{index}")
        loaded = [AutoTokenizer.from_pretrained(tmp_path / f"{index}"), RobertaTokenizer.from_pretrained(tmp_path / f"{index}")]
        save_tokenizer(loaded[0], tmp_path / f"{index}-again")
        for kind in (AutoTokenizer, RobertaTokenizer):
            loaded.append(kind.from_pretrained(tmp_path / f"{index}-again"))
        loaded[0].save_pretrained(tmp_path / f"{index}-by-hand")
        loaded.append(AutoTokenizer.from_pretrained(tmp_path / f"{index}-by-hand"))
        for text in [*TEXTS, *(document[:100] for document in documents[:200]), "the <mask> now", "@USER SAID: 2024"]:
            for other in loaded:
                assert other(text)["input_ids"] == made(text)["input_ids"]
        assert [other.model_max_length for other in loaded] == [64] * 5


def test_folder(tokenizer, tmp_path: Path):
    "A tokenizer folder has a manifest, is replaced only if it holds nothing else, and its files may share a folder."
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    assert is_intact(tmp_path / "tokenizer") and read_manifest(tmp_path / "tokenizer")["kind"] == "tokenizer"
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {"manifest.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    (tmp_path / "tokenizer" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="notes.txt"):
        save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "config.json").touch()
    write_tokenizer_files(tokenizer, tmp_path)
    assert names - {"manifest.json"} <= {path.name for path in tmp_path.iterdir()}


def test_home_folder(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tokenizer(tokenizer, "~/mine")
    assert is_intact(tmp_path / "mine") and load_tokenizer("~/mine").get_vocab() == tokenizer.get_vocab()


def test_load_tokenizer(tokenizer, tmp_path: Path):
    "A missing folder and missing special tokens are errors."
    with pytest.raises(ValueError, match="neither a tokenizer folder"):
        load_tokenizer(tmp_path / "missing")
    bare = RobertaTokenizer(vocab=tokenizer.get_vocab(), merges=[])
    bare.mask_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="it has no mask_token"):
        load_tokenizer(tmp_path / "bare")
    for role, other in (("pad_token", "</s>"), ("mask_token", "<pad>")):
        shared = RobertaTokenizer(vocab=tokenizer.get_vocab(), merges=[], **{role: other})
        shared.save_pretrained(tmp_path / role)
        with pytest.raises(ValueError, match=f"{role}.* have the same id: give each one of its own"):
            load_tokenizer(tmp_path / role)
    RobertaConfig(vocab_size=300).save_pretrained(tmp_path / "model")  # Without tokenizer files
    with pytest.raises(ValueError, match="only special tokens: its folder has no tokenizer files"):
        load_tokenizer(tmp_path / "model")


def test_fingerprint(documents: list[str], tokenizer, tmp_path: Path):
    "Padding and truncation of earlier calls do not change a fingerprint, another vocabulary does; training is deterministic."
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    loaded(documents[:2], padding=True, truncation=True, max_length=8)
    assert loaded.backend_tokenizer.padding and copy_backend(loaded).padding is None
    assert fingerprint_tokenizer(loaded) == fingerprint_tokenizer(tokenizer)
    assert fingerprint_tokenizer(train_tokenizer(documents[:300], TokenizerConfig())) != fingerprint_tokenizer(tokenizer)
    again = train_tokenizer(documents, TokenizerConfig(vocab_size=2_000, max_length=64))
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(tokenizer)
    with pytest.raises(AttributeError, match="backend_tokenizer"):
        copy_backend("tokenizer")


def test_dropout_of_merges(documents: list[str], tokenizer):
    "It is turned off where text is encoded, since a dataset would be random, and stays in the tokenizer itself."
    random = copy.deepcopy(tokenizer)
    random.backend_tokenizer.model.dropout = 0.5
    encode = Encoder(random)
    assert all((encode(documents[:50])[0] == Encoder(tokenizer)(documents[:50])[0]).all() for _ in range(2))
    assert random.backend_tokenizer.model.dropout == 0.5
    assert fingerprint_tokenizer(random) == fingerprint_tokenizer(tokenizer)


CHANGES = {
    "order": lambda facts: dict(reversed(facts.items())),
    "version": lambda facts: facts | {"version": "9.9"},
    "unset options": lambda facts: facts | {"model": facts["model"] | {"new_option": False, "newer_option": None}},
    "merges": lambda facts: facts | {"model": facts["model"] | {"merges": list(map(" ".join, facts["model"]["merges"]))}},
    "vocabulary": lambda facts: facts | {"model": facts["model"] | {"vocab": dict(reversed(facts["model"]["vocab"].items()))}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_is_the_meaning(tokenizer, change: str):
    "What another version of `tokenizers` writes differently does not make another tokenizer."
    changed = CHANGES[change](json.loads(copy_backend(tokenizer).to_str()))
    for indent in (None, 4):
        content = json.dumps(changed, indent=indent)
        assert content != copy_backend(tokenizer).to_str()
        assert module._hash_meaning(content) == fingerprint_tokenizer(tokenizer)


@pytest.mark.parametrize("part, key", [("model", "merges"), ("model", "vocab"), (None, "added_tokens")])
def test_fingerprint_sees_differences(tokenizer, part: str | None, key: str):
    "A missing merge, another id, another special token: another tokenizer."
    facts = json.loads(copy_backend(tokenizer).to_str())
    inside = facts[part] if part else facts
    if key == "vocab":
        inside[key]["Ġthe"] += 1
    else:
        inside[key].pop()
    assert module._hash_meaning(json.dumps(facts)) != fingerprint_tokenizer(tokenizer)
    facts["pre_tokenizer"]["add_prefix_space"] = True
    assert module._hash_meaning(json.dumps(facts)) != fingerprint_tokenizer(tokenizer)


def test_reuse(tmp_path: Path):
    "A tokenizer is named when the block succeeds, reused with the same key, and kept after any error in the block."
    corpus = open_corpus(islice(docstrings(), 300))
    config = TokenizerConfig(vocab_size=600, path_to_save_tokenizer=tmp_path / "tokenizer")
    with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.name.startswith(".tokenizer.") and unfinished.name.endswith(".unfinished")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert len(load_tokenizer(tmp_path / "tokenizer")) == 600 and not find_damage(tmp_path / "tokenizer")
    written = (tmp_path / "tokenizer").stat().st_mtime_ns
    with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
        pass
    assert (tmp_path / "tokenizer").stat().st_mtime_ns == written
    smaller, calls = replace(config, vocab_size=400), []
    with patch.object(module, "train_tokenizer", lambda *given: (calls.append(1), train_tokenizer(*given))[1]):
        for error in (KeyboardInterrupt, OSError, ValueError, TextError):
            with pytest.raises(error), reuse_or_train_tokenizer(corpus, smaller, corpus.fingerprint()) as kept:
                assert len(kept) == 400
                raise error
            assert len(list(tmp_path.iterdir())) == 2 and len(load_tokenizer(tmp_path / "tokenizer")) == 600
        assert len(calls) == 1
        next(tmp_path.glob(".*/tokenizer/tokenizer.json")).write_text("damaged")
        with reuse_or_train_tokenizer(corpus, smaller, corpus.fingerprint()):
            assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert len(load_tokenizer(tmp_path / "tokenizer")) == 400


def test_failed_training_leaves_nothing(tmp_path: Path):
    "An error while the tokenizer is trained leaves no folder, and the next call trains."
    config = TokenizerConfig(vocab_size=600, path_to_save_tokenizer=tmp_path / "tokenizer")
    corpus = open_corpus(islice(docstrings(), 300))
    with patch.object(module, "train_tokenizer", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
            pass
    assert not list(tmp_path.iterdir())
    with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()) as made:
        assert len(made) == 600


def test_one_tokenizer_at_a_time(tmp_path: Path):
    "A second job that trains the same tokenizer gets an error, and the first one is not disturbed."
    config = TokenizerConfig(vocab_size=600, path_to_save_tokenizer=tmp_path / "tokenizer")
    corpus = open_corpus(islice(docstrings(), 300))
    with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
        with pytest.raises(RuntimeError, match="path_to_save_tokenizer=.* is in use by another run"):
            with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_reuse_never_replaces_other_files(tmp_path: Path):
    "A folder with other files is an error before the training begins."
    (tmp_path / "notes.txt").touch()
    corpus = open_corpus(islice(docstrings(), 10))
    config = TokenizerConfig(vocab_size=300, path_to_save_tokenizer=tmp_path)
    with pytest.raises(FileExistsError, match="notes.txt"):
        with reuse_or_train_tokenizer(corpus, config, corpus.fingerprint()):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]




def test_two_files_of_langformers_are_a_tokenizer(tmp_path: Path):
    "`ByteLevelBPETokenizer.save_model` writes `vocab.json` and `merges.txt` only, which do not name a class."
    trainer, special = ByteLevelBPETokenizer(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(["some text", "some other text"], vocab_size=300, special_tokens=special)
    trainer.save_model(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.all_special_ids and tokenizer.mask_token_id == 4
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "<s>some text</s>"
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
