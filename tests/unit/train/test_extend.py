"A model from a folder, with more words or positions in a new folder that trains on; the old one is not touched."

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    pipeline,
)

from langmlm import tasks
from langmlm.config import SPECIAL_TOKENS, ConfigError
from langmlm.text.corpus import docstrings
from langmlm.train.checkpoint import load_model
from langmlm.train.extend import _loss_per_byte, _make_splitter, extend_positions, extend_tokenizer


TRAINER = {"vocab_size": 500, "special_tokens": list(SPECIAL_TOKENS), "show_progress": False}


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(create: Callable, tmp_path: Path) -> Path:
    create(tmp_path / "run").train(4)
    return tmp_path / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    "Twice the text that the tokenizer is trained on."
    (tmp_path / "text.txt").write_text("\n".join(islice(docstrings(), 150)), encoding="utf-8")
    return tmp_path / "text.txt"


def test_an_extended_model_trains_on(run: Path, text: Path, tmp_path: Path):
    before, folder = read_all(run), tmp_path / "extended"
    extension = extend_tokenizer(run, text, n=50, min_count=3, path_to_save=folder)
    assert read_all(run) == before
    assert len(extension.words) == 50 and extension.tokens[1] < extension.tokens[0]
    report = tasks.create_tokenizer(text, {"path_to_save_dataset": tmp_path / "data", "max_length": 32}, folder).train()
    assert (report["statistics"]["tokens"], report["statistics"]["bytes"]) == (extension.tokens[1], extension.bytes)
    assert f"{extension.tokens[0]:,} -> {extension.tokens[1]:,}" in str(extension)
    config = {"output_dir": tmp_path / "run-2", "max_steps": 2, "per_device_train_batch_size": 4}
    task = tasks.create_mlm(folder, tmp_path / "data", checkpoint_path=folder, training_config=config)
    assert task.state.step == 0 and task.model.config.vocab_size == 550
    task.train()
    final = tmp_path / "run-2" / "final_model"
    filled = pipeline("fill-mask", model=str(final), tokenizer=str(final))("Return the <mask>.")
    assert len(filled) == 5 and AutoModelForMaskedLM.from_pretrained(final).config.vocab_size == 550


def test_given_words_are_added_in_both_spellings(run: Path, text: Path, tmp_path: Path, caplog):
    options = {"tokenizer_config": {"lowercase": True, "vocab_size": 900, "document": "file"}}
    extension = extend_tokenizer(run, text, ["quaternion"], path_to_save=tmp_path / "extended", **options)
    assert "these options have no effect on new words: lowercase, vocab_size" in caplog.text
    assert extension.words == [" quaternion", "quaternion"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "extended")
    assert tokenizer.tokenize("quaternion quaternion quaternions")[:2] == ["quaternion", "Ġquaternion"]
    assert len(tokenizer.tokenize(" quaternions")) > 2
    assert extension.tokens[0] == extension.tokens[1]  # It is not in the text


def test_the_loss_of_two_vocabularies_is_that_of_the_same_words(run: Path, text: Path, tmp_path: Path):
    extension = extend_tokenizer(run, text, ["quaternion"], path_to_save=tmp_path / "extended")
    assert extension.loss[0] == pytest.approx(extension.loss[1], abs=0.01)  # Two more outputs, no other change
    model, tokenizer = load_model(run / "checkpoint-4").eval(), AutoTokenizer.from_pretrained(run / "checkpoint-4")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # All tokens are equally likely
    uniform = _loss_per_byte(model, tokenizer, ["a" * 20] * 200)
    tokens = len(tokenizer.tokenize("a" * 20))
    assert uniform == pytest.approx(tokens * torch.log(torch.tensor(500.0)).item() / 20)


def test_a_longer_model_trains_on(run: Path, text: Path, tmp_path: Path):
    before, folder = read_all(run), tmp_path / "longer"
    extend_positions(run, 48, folder)
    assert read_all(run) == before and AutoTokenizer.from_pretrained(folder).model_max_length == 48
    tasks.create_tokenizer(text, {"path_to_save_dataset": tmp_path / "data"}, folder).train()
    config = {"output_dir": tmp_path / "run-2", "max_steps": 2, "per_device_train_batch_size": 4}
    task = tasks.create_mlm(folder, tmp_path / "data", checkpoint_path=folder, training_config=config)
    assert task.dataset.max_length == 48 and task.dataset.lengths.max() == 48
    task.train()


def test_inputs_are_never_overwritten(run: Path, text: Path, tmp_path: Path):
    before = read_all(tmp_path)
    for target in (run, run / "checkpoint-4", text.parent):
        with pytest.raises((FileExistsError, ConfigError), match="path_to_save"):
            extend_tokenizer(run, text, path_to_save=target)
        with pytest.raises((FileExistsError, ConfigError), match="path_to_save"):
            extend_positions(run, 48, target)
    with pytest.raises(ConfigError, match="is inside checkpoint_path"):
        extend_positions(run, 48, run / "longer")
    assert read_all(tmp_path) == before


def test_errors_come_before_the_work_and_leave_nothing(run: Path, text: Path, tmp_path: Path):
    folder = tmp_path / "extended"
    wrong = [
        ({"n": 0}, "n and min_count must be integers of at least 1, got 0 and 10"),
        ({"n": "5"}, "n and min_count must be integers of at least 1, got '5' and 10"),
        ({"words": "covid"}, r"words must be a list, got 'covid': pass words=\['covid'\]"),
        ({"words": ["two words"]}, "'two words' is not one word"),
        ({"words": ["the"], "tokenizer_config": {"document": "page"}}, "document must be one of"),
        ({"min_count": 10**6}, "no word with several pieces occurs min_count=1,000,000 times"),
        ({"words": []}, "no word to add: words is empty"),
        ({"words": 5}, "words must be a list, got 5"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            extend_tokenizer(run, text, path_to_save=folder, **options)
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text, texts)
    with pytest.raises(FileExistsError, match="path_to_save='s3:/bucket/model' must be a local path"):
        extend_positions(run, 64, "s3://bucket/model")
    with pytest.raises(ValueError, match="path_to_save='.*' is inside data_path='"):
        extend_tokenizer(run, [text, texts], path_to_save=texts / "new")
    with pytest.raises(ValueError, match="checkpoint_path must be a folder or a name on the Hub, got an object of dict"):
        extend_tokenizer({}, text, path_to_save=folder)
    for max_length in (32, "64"):
        with pytest.raises(ValueError, match=f"max_length must be an integer above 32, .* got {max_length!r}"):
            extend_positions(run, max_length, folder)
    assert not folder.exists()


def test_marks_of_the_ends_of_words(text: Path, tmp_path: Path):
    "Whole words would be looked up without the mark, so nearly all old words would get other tokens."
    backend = Tokenizer(BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train([str(text)], BpeTrainer(end_of_word_suffix="</w>", **TRAINER))
    with pytest.raises(ValueError, match="its BPE marks ends of words with '</w>', so old words would get other tokens"):
        _make_splitter(backend)
    backend.model = BPE()
    assert _make_splitter(backend)("two words") == ["two", "words"]


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_other_families_are_extended(family: str, text: Path, tmp_path: Path):
    backend, trainer = Tokenizer(Unigram()), UnigramTrainer(unk_token="<unk>", **TRAINER)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    config, model_class = XLMRobertaConfig, XLMRobertaForMaskedLM
    if family == "bert":
        backend, trainer = Tokenizer(WordPiece(unk_token="<unk>")), WordPieceTrainer(**TRAINER)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        config, model_class = BertConfig, BertForMaskedLM
    backend.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    roles = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **roles)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 34}
    model = model_class(config(vocab_size=len(tokenizer), **sizes, **ids))
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "extended"
    for word in ("U.S.", "COVID-19"):  # Never a part of it
        with pytest.raises(ConfigError, match=f"'{word}' is not one word to this tokenizer"):
            extend_tokenizer(tmp_path / "model", text, words=[word], path_to_save=folder)
    extension = extend_tokenizer(tmp_path / "model", text, n=20, min_count=3, path_to_save=folder)
    assert len(extension.words) == 20 and extension.tokens[1] < extension.tokens[0]
    report = tasks.create_tokenizer(text, {"path_to_save_dataset": tmp_path / "data"}, folder).train()
    assert report["statistics"]["tokens"] == extension.tokens[1]
    options = {"output_dir": tmp_path / "run", "max_steps": 2, "per_device_train_batch_size": 4}
    tasks.create_mlm(folder, tmp_path / "data", checkpoint_path=folder, training_config=options).train()
    final = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "final_model")
    assert type(final) is model_class and final.config.vocab_size == len(tokenizer) + 20
    extend_positions(folder, 60, tmp_path / "longer")
    longer = AutoModelForMaskedLM.from_pretrained(tmp_path / "longer").config
    assert longer.max_position_embeddings == 60 + (0 if family == "bert" else 2)
