"Whole words are masked whatever tokenizer made the tokens, in scripts with and without spaces."

import json
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from langmlm import tasks
from langmlm.data.batching import make_flat_batch
from langmlm.data.dataset import TokenizedDataset
from langmlm.data.masking import check_words, mask_batch, masking_rules
from langmlm.tokens.encode import find_word_starts, token_bytes
from langmlm.tokens.tokenizer import SPECIAL_TOKENS, TokenizerConfig, train_tokenizer

WORDS = {
    "English": "the quick brown fox jumps over lazy dogs while seventeen unbelievable mathematicians reconsider their "
    "incomprehensible counterexamples and misunderstand uncharacteristically straightforward explanations",
    "Chinese": "我们 今天 去 北京 大学 学习 自然 语言 处理 模型 理解 文本 然后 预测 被 遮盖 的 词 天气 很 好 机器 翻译 问题 研究 人员 发现 新 方法",
    "Japanese": "私 たち は 東京 へ 行き ます 自然 言語 処理 の モデル を 学ぶ テキスト 理解 する ために 天気 が とても 良い です コンピュータ 新しい 方法",
    "Thai": "เรา ไป เรียน ภาษา ไทย ที่ มหาวิทยาลัย วันนี้ อากาศ ดี มาก แบบจำลอง เข้าใจ ข้อความ และ ทำนาย คำ ที่ ถูก ปิด ไว้ นักวิจัย พบ วิธี ใหม่",
}
SPACES = {"English": " ", "Chinese": "", "Japanese": "", "Thai": ""}
LANGUAGES = [*WORDS, "mixed"]


@lru_cache
def texts(language: str) -> list[str]:
    "400 lines of 20 to 60 words; the mixed ones have two or more languages each."
    rng = np.random.default_rng(len(language))
    if language == "mixed":
        return [" ".join(line[:15] for line in lines * 2) for lines in zip(*map(texts, WORDS))]
    words = WORDS[language].split()
    return [SPACES[language].join(rng.choice(words, rng.integers(20, 60))) for _ in range(400)]


def word_piece() -> tuple[Tokenizer, trainers.Trainer]:
    "As BERT."
    backend = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=10_000))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(vocab_size=110, special_tokens=[*SPECIAL_TOKENS], show_progress=False)


def word_piece_at_spaces() -> tuple[Tokenizer, trainers.Trainer]:
    "WordPiece that leaves Chinese characters together, so that most of them are continuations."
    backend, trainer = word_piece()
    backend.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend, trainer


def unigram() -> tuple[Tokenizer, trainers.Trainer]:
    "As XLM-R."
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": [*SPECIAL_TOKENS], "unk_token": "<unk>", "show_progress": False}
    return backend, trainers.UnigramTrainer(vocab_size=400, n_sub_iterations=1, shrinking_factor=0.5, **options)


def byte_fallback() -> tuple[Tokenizer, trainers.Trainer]:
    "As Llama: words begin with ▁, and unknown characters are three tokens like <0xE6>."
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    known = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    return backend, trainers.BpeTrainer(vocab_size=500, special_tokens=known, limit_alphabet=60, show_progress=False)


def byte_level() -> tuple[Tokenizer, trainers.Trainer]:
    "Byte-level BPE whose vocabulary lacks the bytes that do not occur."
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return backend, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL_TOKENS], show_progress=False)


def word_level() -> tuple[Tokenizer, trainers.Trainer]:
    "Every word is a token."
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend, trainers.WordLevelTrainer(vocab_size=400, special_tokens=[*SPECIAL_TOKENS], show_progress=False)


FAMILIES = {each.__name__: each for each in (word_piece, word_piece_at_spaces, unigram, byte_fallback, byte_level)}


def wrap(backend: Tokenizer) -> PreTrainedTokenizerBase:
    "A tokenizer of transformers."
    roles = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@lru_cache
def make_tokenizer(family: str, language: str) -> PreTrainedTokenizerBase:
    "A tokenizer of a family, trained on a language."
    if family == "ours":
        return train_tokenizer(texts(language), TokenizerConfig(vocab_size=400, min_frequency=2))
    if family == "ours, of English":  # Which knows no character of the other scripts
        return train_tokenizer(texts("English"), TokenizerConfig(vocab_size=400, min_frequency=2))
    backend, trainer = FAMILIES[family]()
    backend.train_from_iterator(texts(language), trainer)
    state = json.loads(backend.to_str())  # The trainer takes the bytes of `byte_fallback` for special tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return wrap(Tokenizer.from_str(json.dumps(state)))


def tokenize(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> TokenizedDataset:
    "One sequence per line, of at most 64 tokens."
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    return TokenizedDataset(Dataset.from_dict({"input_ids": [[ends[0], *line[:62], ends[1]] for line in ids]}))


word_starts = lru_cache(find_word_starts)  # Called for each of hundreds of sequences


def words_of(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[list[int]]:
    "The ordinary ids of a sequence, grouped into words."
    starts, special, words = word_starts(tokenizer), {*tokenizer.all_special_ids}, [[]]
    for id in ids:
        if id not in special:
            words += [[]] if starts[id] else []
            words[-1].append(int(id))
    return [word for word in words if word]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", [*FAMILIES, "ours", "ours, of English"])
def test_shares(family: str, language: str):
    "Per sequence, 15% are predicted on average, and sequences are without predictions as often as their words imply."
    tokenizer = make_tokenizer(family, language)
    dataset = tokenize(tokenizer, texts(language))
    rules = masking_rules(tokenizer, word_start=find_word_starts(tokenizer))
    check_words(dataset.flat(range(len(dataset))), dataset.lengths[:], rules)
    words = [words_of(tokenizer, dataset[row]) for row in range(len(dataset))]
    batch, shares = make_flat_batch(dataset, range(len(dataset)), tokenizer.pad_token_id), []
    sequence = np.repeat(np.arange(len(dataset)), np.diff(batch.cu_seqlens))
    ordinary = ~rules.special[batch.input_ids.numpy()]
    tokens = np.bincount(sequence, ordinary)
    for epoch in range(10):
        masked = mask_batch(batch, epoch, rules).masked_positions.numpy()
        shares.append(np.bincount(sequence[masked], minlength=len(dataset)) / tokens)
    shares = np.array(shares)
    assert shares.mean() == pytest.approx(0.15, abs=0.01)
    without = np.mean([0.85 ** len(each) for each in words])
    assert without < 0.35 and (shares == 0).mean() == pytest.approx(without, abs=0.02)
    assert (shares > 0.7).mean() < 0.01


@pytest.mark.parametrize("family", [*FAMILIES, "ours"])
def test_words_of_spaced_text(family: str):
    "The words of English are those between its spaces, the first one included, and are masked whole."
    tokenizer, vocabulary = make_tokenizer(family, "English"), token_bytes(make_tokenizer(family, "English"))
    lines = texts("English")
    if "word_piece" not in family:  # Words that the tokenizer has to put together; unknown ones in WordPiece
        lines = [line[::-1] for line in lines]
    dataset = tokenize(tokenizer, lines)
    rules = masking_rules(tokenizer, word_start=find_word_starts(tokenizer))
    for row in range(20):
        words = words_of(tokenizer, dataset[row])
        decoded = [b"".join(vocabulary[id] for id in word).decode().strip() for word in words]
        assert decoded[:-1] == lines[row].split()[: len(decoded) - 1]  # The last may be cut
        assert max(map(len, words)) > 1
        ends = 1 + np.cumsum([0, *map(len, words)])
        for epoch in range(10):
            masked = mask_batch(make_flat_batch(dataset, [row], tokenizer.pad_token_id), epoch, rules).masked_positions
            counts = np.histogram(masked, ends)[0]
            assert all(count in (0, len(word)) for count, word in zip(counts, words))
            assert counts.sum() == len(masked)


@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai", "mixed"])
@pytest.mark.parametrize("family", [*FAMILIES, "ours", "ours, of English"])
def test_words_of_other_scripts(family: str, language: str):
    "Words are whole characters, and not many of them; together they are the text."
    tokenizer = make_tokenizer(family, language)
    vocabulary, dataset = token_bytes(tokenizer), tokenize(tokenizer, texts(language))
    for row in range(20):
        words = words_of(tokenizer, dataset[row])[:-1]  # The last may be cut inside a character
        decoded = [b"".join(vocabulary[id] for id in word).decode() for word in words]
        others = [word.strip() for word in decoded if not word.isascii()]
        assert max(map(len, others)) <= 25 and np.median([*map(len, others)]) <= 8
        if "word_piece" not in family:
            assert texts(language)[row].startswith("".join(decoded).strip())


def test_ordinary_text_is_masked_as_before(tmp_path: Path):
    "In byte-level BPE, words begin where they always did: with a space, a line break or a tab, and nowhere else."
    tokenizer = train_tokenizer(texts("English"), TokenizerConfig(vocab_size=400))
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    before = np.array([name.startswith(("Ġ", "Ċ", "ĉ", "č")) for name in names])
    differing = [names[id] for id in np.flatnonzero(before != find_word_starts(tokenizer))]
    assert differing == list("àãäåæçèé")  # Bytes 0xE0 and 0xE3 to 0xE9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("naïve Ünal “quoted” – 5€…", ["naïve", " Ünal", " “quoted”", " –", " 5€…"]),
        ("привет мир, γειά σου κόσμε", ["привет", " мир,", " γειά", " σου", " κόσμε"]),
        ("안녕하세요 세계", ["안녕하세요", " 세계"]),
        ("fox🙂🙂 dogs ✓→", ["fox🙂🙂", " dogs", " ✓→"]),
        ("看fox 好。\n\tfox", ["看fox", " ", "好", "。", "\n", "\tfox"]),
    ],
)
def test_scripts(text: str, words: list[str]):
    "Punctuation and emoji continue a word, also where a byte-level tokenizer knows no such character."
    tokenizer = make_tokenizer("ours", "English")
    vocabulary, ids = token_bytes(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [b"".join(vocabulary[id] for id in word).decode() for word in words_of(tokenizer, ids)] == words


def test_marks():
    "A vowel sign of Hindi or Thai never begins a word."
    text = "हिन्दी भाषा ที่ กำ"
    tokenizer = train_tokenizer([text] * 9, TokenizerConfig(vocab_size=270))
    vocabulary, ids = token_bytes(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    words = [b"".join(vocabulary[id] for id in word).decode() for word in words_of(tokenizer, ids)]
    assert words[:2] == ["हिन्दी", " भाषा"]
    thai = make_tokenizer("byte_fallback", "Thai")
    pairs = zip(token_bytes(thai), find_word_starts(thai))
    marks = [start for token, start in pairs if unicodedata.category(token.decode(errors="replace")[:1] or " ") == "Mn"]
    assert marks and not any(marks)


def test_word_level():
    "If every token is a word, every token begins one."
    backend, trainer = word_level()
    backend.train_from_iterator(texts("English"), trainer)
    assert find_word_starts(wrap(backend)).all() and token_bytes(wrap(backend))[9].startswith(b" ")


def test_no_word_starts():
    "A tokenizer that drops spaces without a trace is an error, and so is one that marks where words end."
    for model, options in ((models.BPE(), {}), (models.BPE(end_of_word_suffix="</w>"), {"end_of_word_suffix": "</w>"})):
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=[*SPECIAL_TOKENS], show_progress=False, **options)
        backend.train_from_iterator(texts("English"), trainer)
        with pytest.raises(ValueError, match="does not tell where words begin: .*: set whole_word_masking=False"):
            find_word_starts(wrap(backend))


@pytest.mark.parametrize("length", [30, 2_000])
def test_text_without_words(length: int, data: dict[str, Path], tmp_path: Path):
    "Whole-word masking of proteins is an error before the run begins, and does not depend on how they are cut."
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for _ in range(300)]
    (tmp_path / "proteins.txt").write_text("\n".join(lines), encoding="utf-8")
    config = {"max_length": 32, "path_to_save_dataset": tmp_path / "dataset"}
    tasks.create_tokenizer(tmp_path / "proteins.txt", config, data["tokenizer"]).train()
    architecture = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    arguments = {"tokenizer": data["tokenizer"], "tokenized_dataset": tmp_path / "dataset", "model_config": architecture}
    training = {"output_dir": tmp_path / "run", "max_steps": 1, "bf16": False}
    tasks.create_mlm(**arguments, training_config=training)
    with pytest.raises(ValueError, match="a single word has more than half of the tokens .*: set it to False"):
        tasks.create_mlm(**arguments, training_config=training | {"whole_word_masking": True})
    assert not (tmp_path / "run").exists()


def test_check_words():
    "Half of the sequences may be a single word, short ones always."
    tokenizer = make_tokenizer("ours", "English")
    rules = masking_rules(tokenizer, word_start=find_word_starts(tokenizer))
    word, space = 300, tokenizer.convert_tokens_to_ids("Ġ")
    assert not rules.word_start[word] and rules.word_start[space]
    good, bad, short = [0, *[space, word] * 10, 2], [0, *[word] * 20, 2], [0, *[word] * 14, 2]
    for sequences, is_error in (([good, bad], False), ([good, bad, bad], True), ([short] * 9, False), ([bad], True)):
        arguments = np.concatenate(sequences), np.array(list(map(len, sequences))), rules
        if is_error:
            with pytest.raises(ValueError, match="whole_word_masking=True does not suit this dataset"):
                check_words(*arguments)
        else:
            check_words(*arguments)


def test_a_model_of_characters():
    "A word-level model whose words are characters, spaces included: only the space begins a word."
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, " ": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer)[1:] == [b"a", b" ", b"b"]
    assert find_word_starts(tokenizer).tolist()[1:] == [False, True, False]
