"Encoding on several threads, split points, sequences, and their files."

import copy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from langmlm.tokens import encode as module
from langmlm.text.selection import ContentHash
from langmlm.tokens.encode import (
    CHARACTERS_PER_BATCH,
    DOCUMENTS_PER_BATCH,
    Encoder,
    encode_documents,
    flag_tokens,
    map_in_order,
    read_sequences,
    split_documents,
    token_bytes,
    write_sequences,
)
from langmlm.tokens.tokenizer import TokenizerConfig, train_tokenizer


def test_cache_of_bpe_can_be_resized():
    "`tokenizers` still has the private method that enlarges the word cache of a BPE model."
    assert callable(getattr(BPE, "_resize_cache", None)), "tokenizers has renamed BPE._resize_cache: update Encoder"


def test_words_exceed_the_default_cache(documents: list[str]):
    "Even docstrings have more words than the default cache of 10,000."
    split = ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert 10_000 < len({word for document in documents for word, _ in split(document)}) < module._CACHED_WORDS


TEXTS = {
    "English": "It's the LAZY dog's 3.14th café, isn't it?  Two  spaces\tand (naïve) “quotes”. ",
    "Chinese": "我们今天学习自然语言处理，模型理解文本。然后预测被遮盖的词！",
    "Thai": "วันนี้อากาศดีมาก",
    "marks": "e\u0301 a\u0308o\u0302 ﬁne ½ Ⅳ Å ＦＵＬＬ ΣΑΣ ",
    "emoji": "👩‍👩‍👧‍👦🙂 ",
    "no spaces": "MKTAYIAKQRQISFVKSHFSRQ",
}
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC, lowercase": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "strip": normalizers.Strip(),
    "prepend": normalizers.Prepend("_"),
    "replace": normalizers.Replace(Regex(" {2,}"), " "),
    "BERT": normalizers.BertNormalizer(),
}
WORDS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes with a prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "bytes, across words": pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Split(Regex("[0-9]"), "isolated")]
    ),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "first metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "BERT": pre_tokenizers.BertPreTokenizer(),
}


def train(normalizer: normalizers.Normalizer | None, words: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    "A small BPE tokenizer with this normalizer and pre-tokenizer."
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = words
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], max_token_length=12, show_progress=False)
    backend.train_from_iterator(TEXTS.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def in_one_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    "The ids of a text that is not split."
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_long_documents_are_encoded_as_in_one_piece(normalizer: str, words: str, monkeypatch: pytest.MonkeyPatch):
    "Whatever a tokenizer does at the beginning and end of a text, pieces have the ids of the whole."
    tokenizer = train(NORMALIZERS[normalizer], WORDS[words])
    encode, empty = Encoder(tokenizer), in_one_piece(tokenizer, "")
    monkeypatch.setattr(module, "_CONTEXT", 64)
    for text in (*(text * 10 for text in TEXTS.values()), "".join(TEXTS.values()) * 4):  # More have the same splits
        whole = in_one_piece(tokenizer, text)
        for characters in (30, 31, 57):
            monkeypatch.setattr(module, "_CACHE_CHARACTERS", characters // 2)
            monkeypatch.setattr(module, "_MAX_CHARACTERS", characters)
            assert "".join(encode._split(text)) == text
            ids, lengths = encode([text, "", text])
            assert ids.tolist() == whole + empty + whole
            assert lengths.tolist() == [len(whole), len(empty), len(whole)]


def test_long_documents_are_split(monkeypatch: pytest.MonkeyPatch):
    "Pieces are about as long as they should be wherever a split is possible; else the text is one piece."
    monkeypatch.setattr(module, "_MAX_CHARACTERS", 100)

    def pieces(normalizer: str, words: str, text: str) -> int:
        return len(Encoder(train(NORMALIZERS[normalizer], WORDS[words]))._split(TEXTS[text] * 40))

    monkeypatch.setattr(module, "_CACHE_CHARACTERS", 50)
    for normalizer in ("none", "NFC", "NFKC, lowercase", "BERT", "replace"):
        for words in ("bytes", "bytes with a prefix space", "metaspace", "BERT"):
            assert pieces(normalizer, words, "English") > 20
    assert pieces("none", "bytes", "Chinese") > 5 and pieces("NFC", "bytes", "Chinese") > 5
    assert pieces("none", "bytes, across words", "English") == pieces("prepend", "bytes", "English") == 1
    assert pieces("none", "bytes", "no spaces") == pieces("NFC", "bytes with a prefix space", "Thai") == 1


def test_documents_of_a_million_characters(documents: list[str]):
    "At the true size: words, words without spaces, and characters of several bytes at the border."
    options = {"lowercase": True, "unicode_normalization": "NFKC", "add_prefix_space": True}
    tokenizer = train_tokenizer(documents[:500], TokenizerConfig(vocab_size=600, **options))
    most, encode = module._MAX_CHARACTERS, Encoder(tokenizer)
    for unit, end, pieces in ((" ".join(documents), "xyz ﬁnds words" * 99, 2), ("ﬁ", "xyz" * 99, 1), ("日本語", "、ﬁn 日" * 99, 2)):
        text = (unit * (1 + most // len(unit)))[: most - 1] + end
        assert len(encode._split(text)) == pieces and encode([text])[0].tolist() == in_one_piece(tokenizer, text)


def test_a_panic_is_an_error():
    "A regular expression that backtracks without end is an error that `except Exception` catches, and says what to do."
    words = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = train(None, words)
    with pytest.raises(RuntimeError, match="the tokenizer fails on a text: .*may backtrack too much; use another"):
        Encoder(tokenizer)(["a" * 50 + "!"])
    with pytest.raises(RuntimeError, match="may backtrack too much"):
        list(encode_documents(["a" * 50 + "!"] * 5, tokenizer, num_workers=2))
    with pytest.raises(KeyboardInterrupt), module._panics_as_errors():
        raise KeyboardInterrupt


def test_encoder(documents: list[str], tokenizer):
    "Long, empty and special documents in one batch have the ids that they have alone."
    text, encode = " ".join(documents), Encoder(tokenizer)
    whole = encode([text])[0]
    ids, lengths = encode([text + text, "a </s> b", "", text])
    assert lengths[1:].tolist() == [len(encode(["a </s> b"])[0]), 0, len(whole)]
    assert tokenizer.decode(ids[: lengths[0]]) == text + text and np.array_equal(ids[-lengths[3] :], whole)
    assert tokenizer.decode(encode(["a </s> b"])[0]) == "a </s> b"
    assert encode(documents[:1])[0].tolist() == tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    with pytest.raises(TypeError, match="len()"):
        encode([7])


def test_added_tokens_with_a_space_prevent_splitting(tokenizer):
    "An added token with a space inside could be split in two, so the text is encoded whole."
    with_space = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    with_space.add_tokens(["New York"])
    assert module._can_split_at_spaces(tokenizer.backend_tokenizer) and not module._can_split_at_spaces(with_space)


def test_added_tokens_that_take_the_space_behind_them(tokenizer):
    "A long document has the tokens that the tokenizer itself gives it."
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("message", rstrip=True, normalized=False)])
    text = "the message broker " * 900
    ids, lengths = Encoder(tokenizer)([text])
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"] and lengths.sum() == len(ids)


def test_map_in_order():
    "Results keep the order, heavy items pass alone, and errors are raised."
    assert list(map_in_order(len, [("a" * n, n) for n in range(50)], max_characters=100)) == list(range(50))
    assert list(map_in_order(len, [("heavy", 1_000), ("light", 1)], num_workers=1, max_characters=10)) == [5, 5]
    with pytest.raises(TypeError, match="len()"):
        list(map_in_order(len, [(7, 1)]))


def test_text_in_flight_is_bounded():
    "Items are drawn from the stream only as far as the bound allows."
    drawn, done = [], []

    def items():
        for number in range(20):
            drawn.append(number)
            yield number, 10

    for result in map_in_order(lambda number: number, items(), num_workers=2, max_characters=50):
        done.append(result)
        assert len(drawn) - len(done) <= 6


def test_encode_documents(documents: list[str], tokenizer):
    "Every document is encoded, in batches of about equal work, and the number of threads changes nothing."
    batches = list(encode_documents(documents, tokenizer))
    ids, lengths = (np.concatenate(part) for part in zip(*batches))
    assert len(batches) >= len(documents) / DOCUMENTS_PER_BATCH and len(lengths) == len(documents)
    assert np.array_equal(ids, np.concatenate([ids for ids, _ in encode_documents(documents, tokenizer, num_workers=1)]))
    long = [documents[0] * (1 + CHARACTERS_PER_BATCH // len(documents[0]))] * 3
    assert len(list(encode_documents(long, tokenizer))) == 3


def test_token_bytes(documents: list[str], tokenizer):
    "The bytes of the tokens are the bytes of the text."
    vocabulary = token_bytes(tokenizer)
    for text in ("naïve 日本語 🙂\n\0\x7f", documents[7]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(vocabulary[id] for id in ids) == text.encode()
    assert vocabulary[:3] == [b"<s>", b"<pad>", b"</s>"]


def test_split_points(tokenizer):
    "Flags tell characters, words and sentences apart, and no split point is inside a character."
    assert flag_tokens([b"\x97", b" the", b".)", "。".encode(), b" ("]).tolist() == [1, 2, 4, 8, 2]
    text, flags = "It costs 3.14 (or so). See the docs, please! 日本", flag_tokens(token_bytes(tokenizer))
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    for split_on, least in (("sentence", 3), ("word", 9), ("token", 17)):
        points = np.flatnonzero(module._find_split_points(flags[ids], split_on))
        pieces = [tokenizer.decode(piece) for piece in np.split(ids, points)]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(points) >= least - 1


def test_split_one(documents: list[str], tokenizer):
    "Sequences cover a document without gaps, are short enough, and overlap by the stride."
    text, flags = " ".join(documents[11_000:11_004]), flag_tokens(token_bytes(tokenizer))
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    for split_on in ("token", "word", "sentence"):
        bounds = list(module._split_one(flags[ids], 20, split_on))
        assert "".join(tokenizer.decode(ids[begin:end]) for begin, end in bounds) == text
        assert max(end - begin for begin, end in bounds) <= 20
    overlapping = list(module._split_one(flags[ids], 20, stride=5))
    assert [begin for begin, _ in overlapping[1:]] == [end - 5 for _, end in overlapping[:-1]]
    assert list(module._split_one(np.zeros(5, np.uint8), 1)) == [(index, index + 1) for index in range(5)]
    with pytest.raises(KeyError, match="line"):
        list(module._split_one(flags[ids], 20, "line"))


def test_split_documents(documents: list[str], tokenizer):
    "Splitting loses nothing, truncating keeps the first sequence, and a stride repeats tokens."
    arguments = np.arange(10, 19), np.array([2, 0, 7]), np.zeros(20, np.uint8), 3, (0, 2)
    ids, lengths = split_documents(*arguments)
    assert lengths.tolist() == [4, 5, 5, 3] and ids[(ids != 0) & (ids != 2)].tolist() == list(range(10, 19))
    ids, lengths = split_documents(*arguments, long_lines="truncate")
    assert ids.tolist() == [0, 10, 11, 2, 0, 12, 13, 14, 2]
    ids, lengths = split_documents(*arguments, stride=1)
    assert ids.tolist() == [0, 10, 11, 2, 0, 12, 13, 14, 2, 0, 14, 15, 16, 2, 0, 16, 17, 18, 2]
    encoded, document_lengths = Encoder(tokenizer)(documents)
    flags, special = flag_tokens(token_bytes(tokenizer)), (tokenizer.cls_token_id, tokenizer.sep_token_id)
    for split_on in ("token", "word", "sentence"):
        ids, lengths = split_documents(encoded, document_lengths, flags, 62, special, split_on=split_on)
        assert lengths.max() <= 64 and np.array_equal(ids[~np.isin(ids, special)], encoded)
    with pytest.raises(ValueError, match="lengths must add up"):
        split_documents(encoded[:5], np.array([4]), flags, 62, special)


def test_files_of_sequences(tmp_path: Path):
    "Sequences are read as they were written, with two bytes per token and little else."
    ids, lengths = np.arange(50_000, dtype=np.uint16), np.full(500, 100)
    write_sequences(tmp_path / "file.arrow", ids, lengths)
    for written, read in zip((ids, lengths), read_sequences(tmp_path / "file.arrow")):
        assert np.array_equal(written, read)
    assert (tmp_path / "file.arrow").stat().st_size < 2 * len(ids) + 4 * len(lengths) + 2_000
    with pytest.raises(OSError, match="directory"):
        write_sequences(tmp_path, ids, lengths)


def test_content_hash():
    "A hash depends on ids and lengths, not on their types or on how they are divided into pieces."
    whole, parts, other = ContentHash(), ContentHash(), ContentHash()
    whole.update(np.arange(9), np.array([4, 5]))
    parts.update(np.arange(4, dtype=np.uint16), np.array([4]))
    parts.update(np.arange(4, 9), np.array([5]))
    other.update(np.arange(9), np.array([5, 4]))
    assert whole.hexdigest() == parts.hexdigest() != other.hexdigest()
